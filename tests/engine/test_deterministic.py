"""``trainer.deterministic`` sets what libraries read, contradicts nobody, and leaves a CPU's digits as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.engine.deterministic import VARIABLES, choose_algorithms, prepare
from tests.engine.job import run_job, tiny_job
from tests.models.tiny import tiny_config
from tests.worlds import run_world


def test_libraries_are_told() -> None:
    environment = {"NCCL_ALGO": "Tree", "HOME": "/"}
    prepare(False, environment)
    assert environment == {"NCCL_ALGO": "Tree", "HOME": "/"}
    prepare(True, environment)
    assert environment.pop("HOME") == "/"
    assert environment.pop("NCCL_ALGO") == "Tree"
    others = {name: allowed[0] for name, allowed in VARIABLES.items() if name != "NCCL_ALGO"}
    assert environment == others
    assert others["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert others["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_a_variable_that_contradicts_is_one_line() -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(True, {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"})
    assert str(refused.value) == (
        "trainer.deterministic=true: NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 in the environment contradicts it "
        "(allowed: 0); unset NVTE_ALLOW_NONDETERMINISTIC_ALGO, or set trainer.deterministic=false"
    )


def test_torch_and_megatron_are_asked_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    choose_algorithms(True, torch.device("cpu"))
    choose_algorithms(False, torch.device("cuda"))
    assert asked == []
    choose_algorithms(True, torch.device("cuda"))
    assert asked == [True]
    from hybridprune_megatron.models import build

    cfg = tiny_config("trainer.deterministic=true")
    assert not build.transformer_config(cfg).deterministic_mode
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.transformer_config(cfg).deterministic_mode
    assert not build.transformer_config(tiny_config()).deterministic_mode


def test_on_a_cpu_every_digit_is_the_same(tmp_path: Path) -> None:
    runs = [
        run_world(1, run_job, tiny_job(tmp_path / str(wanted), deterministic=wanted, max_steps=3))[0]
        for wanted in (False, True)
    ]
    plain, deterministic = ([(row["loss"], row["grad_norm"], row["samples"]) for row in rows] for rows in runs)
    assert len(plain) == 3
    assert plain == deterministic
