"""The tuning group: its options compose, defaults change nothing, and what cannot work is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hybridprune_megatron.config import ConfigError, load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.resume import check_resume
from hybridprune_megatron.config.tuning_schema import TuningConfig, language_targets


@pytest.mark.parametrize("option", group_options(CONF_DIR, "tuning"))
def test_option_composes_and_does_what_its_name_says(option: str) -> None:
    cfg = load_config(["experiment=demo", f"tuning={option}"])
    tuning = cfg.tuning
    assert (tuning.budget.distribution != "fixed") == (option == "random_budget")
    assert (tuning.distillation.weight > 0) == (option == "distillation")
    assert (tuning.lora.rank > 0) == (option == "lora")
    assert (tuning == TuningConfig()) == (option == "default")
    # Nothing but adapters learns.
    assert cfg.model.trainable.projector == (option != "lora")
    assert sorted(tuning.lora.targets) == sorted(language_targets())


def test_options_go_together() -> None:
    overrides = ["tuning=lora", "tuning.budget.distribution=loguniform", "tuning.distillation.weight=1"]
    tuning = load_config(["experiment=demo", *overrides]).tuning
    assert (tuning.lora.rank, tuning.budget.distribution, tuning.distillation.weight) == (16, "loguniform", 1.0)


# Overrides over experiment=demo, then the whole line (a regular expression).
ERRORS = {
    "distribution": (
        ["tuning.budget.distribution=normal"],
        r"tuning.budget.distribution=normal: allowed are .*",
    ),
    "bounds": (["tuning.budget.low=0.5", "tuning.budget.high=0.4"], r"tuning.budget.low=0.5: .*at most .*high=0.4; .*"),
    "no choice": (["tuning.budget.distribution=choice"], r"tuning.budget.choices=\[\]: must name at least one .*"),
    "wrong choice": (
        ["tuning.budget.distribution=choice", "tuning.budget.choices=[0.5,1.5]"],
        r"tuning.budget.choices\[1\]=1.5: must be above 0 and at most 1; .*",
    ),
    "unreachable": (
        ["tuning=random_budget", "tuning.budget.low=0.05"],
        r"tuning.budget.low draws 0.05: .*still keeps a mean of 0.100; .*",
    ),
    "explicit schedule": (
        [
            "tuning=random_budget",
            "reduction.budget=0.265",
            "reduction.schedule={name: listed, retention: [1,0.5,0.5,0.25,0.1,0.1,0.05,0.05,0.05,0.05]}",
        ],
        r"tuning.budget.distribution=uniform: reduction.schedule.retention is one fixed schedule.*",
    ),
    "weight": (["tuning.distillation.weight=1.5"], r"tuning.distillation.weight=1.5: must be from 0 to 1; .*"),
    "temperature": (
        ["tuning.distillation.temperature=0"],
        r".*temperature=0.0: must be from 0.01 to 100; .*",
    ),
    "random teacher": (
        ["tuning=distillation", "model.init_checkpoint=null"],
        r"tuning.distillation.teacher=initial: model.init_checkpoint=null, so .* random; .*teacher=self",
    ),
    "idle teacher": (
        ["tuning=distillation", "tuning.distillation.teacher=self", "reduction.budget=1"],
        r"tuning.distillation.teacher=self: nothing is dropped .*",
    ),
    "target": (["tuning.lora.targets=[qkv]"], r"tuning.lora.targets=\['qkv'\]: allowed is a list of in_proj, .*"),
    "no target": (["tuning.lora.targets=[]"], r"tuning.lora.targets=\[\]: allowed is .*"),
    "dropout": (["tuning.lora.dropout=1"], r"tuning.lora.dropout=1.0: must be from 0 to below 1; .*"),
    "frozen target": (
        ["tuning=lora", "tuning.lora.targets=[projector,in_proj]"],
        r"tuning.lora.targets=.*: names projector, and model.trainable.projector=false; set .*=true .*",
    ),
    "rate of a frozen part": (
        ["optim.lr_scale.vision=0.1"],
        r"optim.lr_scale.vision=0.1: model.trainable.vision=false, .*; set model.trainable.vision=true or .*=1",
    ),
    "no rate": (
        ["optim.lr_scale.language=0"],
        r"optim.lr_scale.language=0.0: .*freeze .* model.trainable.language=false.*",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_line_with_value_key_and_fix(case: str) -> None:
    overrides, line = ERRORS[case]
    with pytest.raises(ConfigError) as raised:
        load_config(["experiment=demo", *overrides])
    assert re.fullmatch(line, str(raised.value)), str(raised.value)


def test_initial_weights_that_teach_may_not_change_on_resume(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").write_text("{}")
    for option, refused in (("default", False), ("distillation", True)):
        overrides = ["experiment=demo", f"output_dir={tmp_path}", f"tuning={option}"]
        saved = {"step": 50, "config": plain_config(load_config(overrides))}
        (checkpoint / "run.json").write_text(json.dumps(saved))
        changed = load_config([*overrides, "model.init_checkpoint=other.safetensors"])
        if refused:
            with pytest.raises(ConfigError, match=r"^model.init_checkpoint=other.safetensors: .* holds a run with"):
                check_resume(changed)
        else:
            check_resume(changed)
