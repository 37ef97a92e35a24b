"""The command line reaches the run, through Hydra as through our own checks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hybridprune_megatron.commands import finetune
from hybridprune_megatron.config import Config, load_config
from hybridprune_megatron.engine import parallel


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("reduction.score.mamba_decay=true", {"mamba_decay": True}),
        ("reduction.score={name: random, seed: 3}", {"name": "random", "seed": 3}),
        ("reduction.score=uniform", {"name": "uniform"}),
    ],
)
def test_keys_of_a_score_reach_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, keys: dict[str, object]
) -> None:
    runs: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    monkeypatch.setattr(finetune, "parse_command_line", load_config)
    monkeypatch.setattr(finetune, "hold_stop_signals", lambda say: None)
    monkeypatch.setattr(finetune, "finetune", lambda cfg, launch: runs.append(cfg))
    monkeypatch.setattr(parallel, "shut_down", lambda: None)
    finetune.main(["experiment=demo", f"output_dir={tmp_path}", "name=1.10", override])
    (cfg,) = runs
    assert cfg.name == "1.10"
    assert cfg.reduction.plain()["score"].items() >= keys.items()
