"""Settings that cannot be meant: refused in one line with the key, before anything slow; none is taken silently."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.bounds import Range, check_value
from hybridprune_megatron.config import Config, ConfigError, compose, load_config
from hybridprune_megatron.config.compose import change_config
from hybridprune_megatron.config.fields import all_keys
from hybridprune_megatron.config.flat import plain_config
from tests.hostile.configurations import allowed, due, key_rules, random_overrides, with_keys

KEYS = key_rules()
NAMES = sorted({*all_keys(), *KEYS}, key=len, reverse=True)
LONG_RUN = 3000


def value_of(cfg: Config, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def problem_of(pairs: list[tuple[str, str]]) -> str | None:
    """What is wrong with how some keys and texts are answered; None if nothing is."""
    wanted = {key: due(key, text, KEYS[key]) for key, text in pairs}
    try:
        cfg = with_keys([f"{key}={text}" for key, text in pairs])
    except ConfigError as error:
        line = str(error)
        if not line.isprintable() or len(line) > 1500:
            return f"not a line to read: {line!r:.300}"
        # Of two keys the line names one; of none that is refused, any that stands against it.
        named = list(wanted) if any(each.refused for each in wanted.values()) else NAMES
        return None if any(name in line for name in named) else f"the key is not named: {line:.300}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for key, each in wanted.items():
        value = value_of(cfg, key)
        value = list(value) if isinstance(value, tuple) else value
        if each.refused or not allowed(value, KEYS[key]) or (each.known and value != each.value):
            return f"{key} is {value!r:.100}"
    return None


def search(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        pairs = random_overrides(draw, KEYS)
        problem = problem_of(pairs)
        if problem is not None:
            found.append(f"{[f'{key}={text:.80}' for key, text in pairs]!a}: {problem!a}")
    return found


def test_random_configurations_are_taken_as_meant_or_refused() -> None:
    assert search(seed=15, count=120) == []


@pytest.mark.slow
def test_many_random_configurations_are_taken_as_meant_or_refused() -> None:
    assert search(seed=16, count=LONG_RUN) == []


ODD_VALUES: list[Any] = [
    *(None, True, float("nan"), float("inf"), -float("inf"), 10**26, -(10**26), 10**400, 1e300, 1e-300, 2**31, 0, 0.5),
    *("", " ", "a", "\n", "a\x00b", "\udcff", b"1", object(), {}, [], [None], [float("nan")], [1.0], ["in_proj"], [[]]),
]


@pytest.mark.parametrize("key", [key for key, rule in KEYS.items() if rule.kind not in (Any, dict)])
def test_no_key_holds_what_its_rule_forbids(key: str) -> None:
    """The rule alone: what a file in conf/, a checkpoint or a program may put into the schema."""
    rule = KEYS[key]
    bounds = (rule.bound.low, rule.bound.high) if isinstance(rule.bound, Range) else ()
    near = [each + step for each in bounds for step in (-1, 0, 1)]
    for value in (*ODD_VALUES, *near, *map(float, near)):
        if allowed(value, rule):
            check_value(key, value, rule)
            continue
        with pytest.raises(ConfigError) as refused:
            check_value(key, value, rule)
        assert str(refused.value).startswith(key)
        assert str(refused.value).isprintable()


REFUSED = {
    "an unset shell variable as weights": (["model.init_checkpoint="], "model.init_checkpoint='': is empty"),
    "an unset shell variable as folder": (["output_dir="], "output_dir='': is empty"),
    "an unset shell variable as data": (["data.train="], "data.train='': is empty"),
    "an unset shell variable as name": (["name="], "name='': is empty"),
    "blanks as tokenizer": (["data.tokenizer='  '"], "data.tokenizer='  ': is empty"),
    "no log folder": (["exp_manager.explicit_log_dir="], "exp_manager.explicit_log_dir='': is empty"),
    "more tokens than the budget": (
        ["reduction.select.min_tokens=256"],
        "reduction.select.min_tokens=256: keeps 1.000 of the 256 visual tokens of the longest video, and the budget is",
    ),
    "half of the tokens": (
        ["reduction.select.min_tokens=128"],
        "reduction.select.min_tokens=128: keeps 0.550 of the 256",
    ),
    "more tokens than the least budget drawn": (
        ["reduction.select.min_tokens=30", "tuning.budget.distribution=uniform"],
        "tuning.budget.low draws 0.15: reduction.select.min_tokens=30: keeps 0.2",
    ),
    "whole frames": (
        ["reduction.select.min_tokens_per_frame=16"],
        "reduction.select.min_tokens_per_frame=16: must be at most 4, what a budget of 0.25 leaves of a frame on",
    ),
    "nan as deviation": (
        ["model.vision.image_std=[1,nan,1]"],
        "model.vision.image_std[1]=nan: must be a finite number",
    ),
    "nan as mean": (["model.vision.image_mean=[nan,0,0]"], "model.vision.image_mean[0]=nan: must be a finite number"),
    "infinite decay": (["optim.weight_decay=inf"], "optim.weight_decay=inf: must be a finite number from 0 on"),
    "nan as step": (["model.time_step_min=nan"], "model.time_step_min=nan: must be a finite number from 0 on"),
    "nan as norm": (["optim.clip_grad=nan"], "optim.clip_grad=nan: must be a finite number from 0 on"),
    "nan for NeMo": (["exp_manager.seconds_to_sleep=nan"], "exp_manager.seconds_to_sleep=nan: must be a finite number"),
    "0 in float32": (["optim.eps=1e-50"], "optim.eps=1e-50: is 0 in float32"),
    "a frame's end": (["data.frame_text='</img>'"], "data.frame_text='</img>': writes </img>, which marks turns"),
    "a video": (["data.frame_text='<video>'"], "data.frame_text='<video>': writes <video>"),
    "a turn by its number": (
        ["data.frame_text='<SPECIAL_{index}>'"],
        "data.frame_text='<SPECIAL_{index}>': writes <SPECIAL_10>",
    ),
    "a turn by its time": (
        ["data.frame_text='<SPECIAL_1{seconds:.0f}>'"],
        "data.frame_text='<SPECIAL_1{seconds:.0f}>': writes <SPECIAL_10>",
    ),
    "what is in a number": (["data.frame_text='{index.__class__}'"], "data.frame_text='{index.__class__}': may use"),
    "a gigabyte a frame": (["data.frame_text='{index:999999999}'"], "data.frame_text='{index:999999999}': may use"),
    "seed": (["trainer.seed=2147483648"], "trainer.seed=2147483648: must be at most 2147483647"),
    "seed of a scorer": (
        ["reduction.score={name: random, seed: 4294967296}"],
        "reduction.score.seed=4294967296: must be at most 2147483647",
    ),
    "above all names": (["name=../../etc"], "name=../../etc: must be a folder below runs"),
    "above in between": (["name=a/../../b"], "name=a/../../b: must be a folder below runs"),
    "anywhere": (["name=/etc"], "name=/etc: must be a folder below runs"),
    "here": (["name=."], "name=.: must be a folder below runs"),
    "too long a name": ([f"name={'x' * 201}"], f"name={'x' * 100}... (201 characters): is longer than the 200 bytes"),
    "steps": ([f"trainer.max_steps={10**25}"], f"trainer.max_steps={10**25}: must be at most 1000000000"),
    "thousands of digits": ([f"trainer.max_steps={'9' * 5000}"], "trainer.max_steps=9999"),
    "a million loaders": (
        ["trainer.global_batch_size=1000000"],
        "trainer.global_batch_size=1000000: gives a process 1000000 packed sequences a step, each with a loader",
    ),
    "loader processes": (
        ["trainer.global_batch_size=256", "data.num_workers=8"],
        "trainer.global_batch_size=256: gives a process 256 packed sequences a step",
    ),
    "no room": (
        ["reduction.select.multiple_of=4096"],
        "reduction.select.multiple_of=4096: a packed sequence divides by 4096",
    ),
    "no room for a video": (
        ["reduction.select.multiple_of=1100", "data.num_frames=120"],
        "reduction.select.multiple_of=1100: a packed sequence divides by 1100 (reduction.select.multiple_of, fp8."
        "recipe, ranks that share it), which leaves 1100 of 2048 tokens, and one video fills 1920; lower it, or raise "
        "data.sequence_length to at least 2200",
    ),
    "adapters wider than the model": (
        ["tuning.lora.rank=100000000"],
        "tuning.lora.rank=100000000: must be at most 1048576",
    ),
    "adapters as wide": (
        ["tuning.lora.rank=129"],
        "tuning.lora.rank=129: must be at most model.hidden_",
    ),
    "minutes": (
        ["trainer.timeout_minutes=1e300"],
        "trainer.timeout_minutes=1e+300: must be above 0 and at most 525600",
    ),
    "copies among the checkpoints": (
        ["output_dir=runs/a", "trainer.copy_checkpoints_to=runs/a/checkpoints"],
        "trainer.copy_checkpoints_to=runs/a/checkpoints: lies in output_dir=runs/a, and what happens to that",
    ),
    "W&B": (
        ["exp_manager.create_wandb_logger=true"],
        "exp_manager.wandb_logger_kwargs.project=None: exp_manager.create_wandb_logger=true needs a project",
    ),
    "MLflow's typo": (
        ["+exp_manager.mlflow_logger_kwargs={experimant_name: mine}"],
        "exp_manager.mlflow_logger_kwargs.experimant_name=mine: unknown key; allowed are experiment_name, run_name",
    ),
    "MLflow's tags": (
        ["+exp_manager.mlflow_logger_kwargs={tags: mine}"],
        "exp_manager.mlflow_logger_kwargs.tags=mine: must be a group of keys",
    ),
    "a folder for MLflow": (
        ["+exp_manager.mlflow_logger_kwargs={tracking_uri: mlruns}"],
        "exp_manager.mlflow_logger_kwargs.tracking_uri=mlruns: is a folder, and MLflow 3 writes to none; give",
    ),
    "a word for MLflow": (
        ["exp_manager.create_mlflow_logger=perhaps"],
        "exp_manager.create_mlflow_logger=perhaps: must be true or false",
    ),
    "NeMo's checkpoints": (
        ["exp_manager.create_checkpoint_callback=true"],
        "exp_manager.create_checkpoint_callback=True: NeMo's callback cannot",
    ),
    "a word for a switch of NeMo's": (
        ["exp_manager.resume_if_exists=perhaps"],
        "exp_manager.resume_if_exists=perhaps: must be true or false",
    ),
    "a number for a switch": (["parallel.sequence_parallel=2"], "parallel.sequence_parallel=2: has the wrong type"),
    "Hydra's own": (["hydra.job.chdir=true"], "hydra.job.chdir=true: Hydra's own settings are fixed"),
    "brackets": (["reduction.layers=" + "[" * 3000], "reduction.layers=[[["),
    "a loop": (["name=${name}"], "name: Recursive interpolation detected"),
}


@pytest.mark.parametrize(("overrides", "line"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_keys(overrides)
    assert str(refused.value).startswith(line)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["1.10", "1.1", "1e3", "1_000", "007", "true", "0x10", "-1.50", "1.10 ", "a/b"])
def test_a_name_is_the_text_that_was_typed(name: str) -> None:
    cfg = load_config([f"name={name}"])
    assert cfg.name == name.strip()
    assert cfg.output_dir == f"runs/{name.strip()}"


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("name: 1.10", "name=1.10: is read as 1.1 in conf/experiment/mine.yaml; write name: '1.10'"),
        ("trainer:\n  max_steps: 010", "trainer.max_steps=010: is read as 8 in conf/experiment/mine.yaml; use digits"),
        ("parallel:\n  sequence_parallel: 2", "parallel.sequence_parallel=2: is read as 2 in conf/experiment/mine"),
        ("name: '1.10'\ntrainer:\n  max_steps: 1_000\noptim:\n  lr: 1e-3\ndata:\n  num_workers: 15", ""),
    ],
    ids=["text", "octal", "switch", "as written"],
)
def test_a_file_says_what_is_read(written: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(compose.CONF_DIR, tmp_path / "conf")
    mine = f"# @package _global_\ndefaults:\n  - demo\n  - _self_\n{written}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    if not line:
        assert compose.checked_config(["experiment=mine"]).name == "1.10"
        return
    with pytest.raises(compose.ConfigError) as refused:
        compose.checked_config(["experiment=mine"])
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_a_file_may_refer_to_another() -> None:
    assert compose.checked_config(["experiment=demo", "reduction=evs"]).reduction.front.retention == 0.25


def test_what_is_reasonable_is_taken() -> None:
    kept = with_keys(["reduction.select.min_tokens=2", "reduction.select.min_tokens_per_frame=1", "data.frame_text=''"])
    assert (kept.reduction.select.min_tokens, kept.data.frame_text) == (2, "")
    assert with_keys(["data.frame_text='{index:03d}/{seconds:.1f} '"]).data.frame_text
    assert with_keys(["trainer.seed=2147483647"]).trainer.seed == 2147483647
    logged = with_keys(
        ["exp_manager.create_wandb_logger=true", "+exp_manager.wandb_logger_kwargs={project: mine}"],
    )
    assert logged.exp_manager["wandb_logger_kwargs"] == {"project": "mine"}


def test_a_short_trial_of_a_recipe_with_a_long_warmup_starts() -> None:
    cfg = load_config(["experiment=nemotron_nano_12b_v2_vl", "trainer.max_steps=3"])
    assert (cfg.optim.warmup_steps, cfg.trainer.max_steps) == (100, 3)


# ---- a stored configuration ------------------------------------------------------------------------------------------


def test_a_stored_configuration_is_checked_as_any_other() -> None:
    saved = plain_config(load_config(["experiment=demo"]))
    assert change_config(saved, ["name=1.10", "reduction.budget=0.5"]).name == "1.10"
    for group, name, value, line in (
        ("optim", "lr", float("nan"), "optim.lr=nan: must be a finite number above 0"),
        ("model", "hidden_size", 10**400, "model.hidden_size=2^1329: must be at most"),
        ("model", "hidden_size", [1], "model.hidden_size: "),
        ("reduction", "bugdet", 1, "reduction.bugdet: unknown key"),
    ):
        with pytest.raises(ConfigError) as refused:
            change_config({**saved, group: {**saved[group], name: value}})
        assert str(refused.value).startswith(line)
    for override in (
        "reduction=none",
        "experiment=demo",
        "reduction.budget=nan",
        "a=[",
        "model.experts={num_experts: 2}",
    ):
        with pytest.raises(ConfigError) as refused:
            change_config(saved, [override])
        assert str(refused.value).isprintable()
