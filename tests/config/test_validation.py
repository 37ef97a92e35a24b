"""Keys of validation and of the checkpoints that stay: what is refused, what may change, what the recipes do."""

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

ON = ("experiment=demo", "trainer.eval_every_n_steps=50")
# Overrides over a demo that validates, then the whole line (a regular expression).
ERRORS = {
    "no figure": (
        ["trainer.keep_best=losses"],
        r"trainer.keep_best=losses: allowed are loss, accuracy, loss_full, accuracy_full; did you mean loss\?",
    ),
    "never": (
        ["trainer.keep_best=loss", "trainer.eval_every_n_steps=0"],
        r"trainer.keep_best=loss: needs validations, and trainer.eval_every_n_steps=0; "
        r"set trainer.eval_every_n_steps or trainer.keep_best=null",
    ),
    "no samples": (
        ["trainer.early_stopping=3", "trainer.eval_samples=0"],
        r"trainer.early_stopping=3: needs validations, and trainer.eval_samples=0; "
        r"set trainer.eval_samples or trainer.early_stopping=0",
    ),
    "no data": (
        ["trainer.keep_best=accuracy", "data.validation=null"],
        r"trainer.keep_best=accuracy: needs validations, and data.validation=null; set data.validation or .*=null",
    ),
    "nothing dropped": (
        ["trainer.keep_best=loss_full", "reduction=none"],
        r"trainer.keep_best=loss_full: nothing is dropped, .*; set trainer.keep_best=loss",
    ),
    "not saved": (
        ["trainer.keep_every_n_steps=70"],
        r"trainer.keep_every_n_steps=70: must be a multiple of trainer.save_every_n_steps=50, at whose multiples "
        r"checkpoints are saved; set e.g. trainer.keep_every_n_steps=100",
    ),
    "none kept": (["trainer.keep_last=0"], r"trainer.keep_last=0: must be at least 1; set e.g. trainer.keep_last=2"),
    "before the start": (["trainer.eval_every_n_steps=-1"], r"trainer.eval_every_n_steps=-1: must be at least 0; .*"),
    "no patience": (["trainer.early_stopping=-1"], r"trainer.early_stopping=-1: must be at least 0; .*"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_line_with_value_key_and_fix(case: str) -> None:
    overrides, line = ERRORS[case]
    with pytest.raises(ConfigError) as raised:
        load_config([*ON, *overrides])
    assert re.fullmatch(line, str(raised.value)), str(raised.value)


def test_scales_that_remember_a_pass_are_refused() -> None:
    run = ["experiment=nemotron_nano_12b_v2_vl", "fp8=delayed", "data.validation=mine"]
    assert load_config(run).validation_steps == 0
    line = (
        r"trainer.eval_every_n_steps=200: fp8.recipe=delayed scales by the passes before, .*; "
        r"set trainer.eval_every_n_steps=0 or fp8=tensorwise"
    )
    with pytest.raises(ConfigError) as raised:
        load_config([*run, "trainer.eval_samples=8"])
    assert re.fullmatch(line, str(raised.value)), str(raised.value)


def test_a_run_validates_if_it_has_samples_for_it() -> None:
    assert load_config([*ON]).validation_steps == 50
    assert load_config([*ON, "trainer.eval_samples=0"]).validation_steps == 0
    assert load_config([*ON, "data.validation=null"]).validation_steps == 0
    # Nothing but the samples has to be asked for.
    mine = load_config(["data.validation=mine", "trainer.eval_samples=8"])
    assert mine.validation_steps == mine.trainer.save_every_n_steps


@pytest.mark.parametrize("name", group_options(CONF_DIR, "experiment"))
def test_no_experiment_of_ours_validates_by_itself(name: str) -> None:
    """The demo and the study evaluate afterwards; others name no samples."""
    cfg = load_config([f"experiment={name}"])
    assert cfg.validation_steps == 0
    assert (cfg.trainer.keep_last, cfg.trainer.keep_best, cfg.trainer.early_stopping) == (2, None, 0)


def test_how_a_run_is_watched_may_change_when_it_goes_on(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").write_text("{}")
    saved = plain_config(load_config([*ON, f"output_dir={tmp_path}"]))
    (checkpoint / "run.json").write_text(json.dumps({"step": 50, "config": saved}))
    changes = {
        "eval_every_n_steps": 25,
        "eval_samples": 8,
        "keep_best": "accuracy",
        "keep_last": 5,
        "keep_every_n_steps": 100,
        "early_stopping": 3,
    }
    given = [f"trainer.{name}={value}" for name, value in changes.items()]
    check_resume(load_config([*ON, f"output_dir={tmp_path}", *given]))
    for name in changes:
        del saved["trainer"][name]
    # A run from before these keys can be resumed too.
    (checkpoint / "run.json").write_text(json.dumps({"step": 50, "config": saved}))
    check_resume(load_config([*ON, f"output_dir={tmp_path}", *given]))
