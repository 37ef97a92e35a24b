"""The command line reaches the run, through Hydra as through our own checks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hybridprune_megatron.commands import finetune
from hybridprune_megatron.config import Config, load_config
from hybridprune_megatron.engine import parallel
from hybridprune_megatron.engine.launch import Launch


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


def test_a_finished_run_says_so_before_anything_slow(monkeypatch, tmp_path, capsys) -> None:
    whole = tmp_path / "checkpoints" / "step_00000050"
    whole.mkdir(parents=True)
    (whole / "metadata.json").write_text("{}")
    (whole / "run.json").write_text('{"files": {}}')
    monkeypatch.setitem(sys.modules, "hybridprune_megatron.engine.module", None)
    cfg = load_config(["experiment=demo", f"output_dir={tmp_path}", "trainer.max_steps=50"])
    finetune.finetune(cfg, Launch())
    first, second, *commands = capsys.readouterr().out.splitlines()
    assert first == "nothing to do: trainer.max_steps=50 steps are done; raise it, or give output_dir=..."
    assert second == f"{tmp_path}: step 50, checkpoints/ and train_log.jsonl; next:"
    assert commands == [
        f"  hybridprune evaluate checkpoint={tmp_path}",
        f"  hybridprune plot {tmp_path}",
        f"  hybridprune export --checkpoint {tmp_path} --out {tmp_path}/hf",
    ]
    # Other ranks are silent, and a run with steps left continues to what is slow.
    finetune.finetune(cfg, Launch(rank=1, world_size=2))
    assert not capsys.readouterr().out
    for more in ("trainer.max_steps=51", "trainer.eval_every_n_steps=25"):
        # A validation that is missing is a step too.
        again = load_config(["experiment=demo", f"output_dir={tmp_path}", "trainer.max_steps=50", more])
        with pytest.raises(ImportError):
            finetune.finetune(again, Launch())
    (tmp_path / "validation_log.jsonl").write_text('{"step": 50, "loss": 1.0}\n')
    finetune.finetune(again, Launch())
    assert capsys.readouterr().out.startswith("nothing to do")
