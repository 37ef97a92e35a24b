"""``finetune -m``: one run after another, a table at the end; a task of an array is one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import compose, sweep
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.evaluation import sweep as command

#: Stands for a run: writes its logs, and ends with the status that the second argument gives.
RUN = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
rows = [{"step": step, "loss": 2.0 / step, "seconds": 0.5} for step in range(1, 21)]
(folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "validation_log.jsonl").write_text(json.dumps({"step": 20, "accuracy": 0.75, "samples": 8}) + "\\n")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses of the runs, in turn."""
    left = [0, 0]
    check = compose.checked_config
    monkeypatch.setattr(sweep, "checked_config", lambda overrides, need_files=False: check(overrides))
    monkeypatch.setattr(
        command, "command", lambda run: [sys.executable, "-c", RUN, run.cfg.output_dir, str(left.pop(0))]
    )
    return left


def overrides(folder: Path) -> list[str]:
    return ["experiment=demo", f"output_dir={folder}", "reduction.budget=0.5,0.25"]


def test_the_table_has_a_row_a_run(tmp_path: Path, statuses: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    statuses[:] = [0, 1]
    assert command.sweep(overrides(tmp_path), Launch()) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"run 1 of 2: {tmp_path}/reduction.budget_0.5"
    header, first, second = (line.split() for line in lines[-3:])
    assert header == ["run", "steps", "loss", "s/step", "val", "accuracy"]
    # The mean of the last two of 20 steps.
    assert first == ["reduction.budget_0.5", "20", "0.1026", "0.5", "0.75"]
    assert second[:1] == ["reduction.budget_0.25"]
    assert second[-4:] == ["ended", "with", "status", "1"]


def test_a_stopped_run_stops_the_sweep(tmp_path: Path, statuses: list[int]) -> None:
    statuses[:] = [command.STOPPED, 0]
    assert command.sweep(overrides(tmp_path), Launch()) == command.STOPPED
    assert [path.name for path in tmp_path.iterdir()] == ["reduction.budget_0.5"]


def test_a_task_of_an_array_is_one_run(tmp_path: Path, statuses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    del statuses
    assert command.array_task() is None
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert command.array_task() == 1
    own = command.overrides_of_task(overrides(tmp_path), 1)
    cfg = compose.load_config(own)
    assert (cfg.reduction.budget, cfg.output_dir) == (0.25, f"{tmp_path}/reduction.budget_0.25")


def test_a_sweep_under_a_launcher_is_one_line(tmp_path: Path, statuses: list[int]) -> None:
    del statuses
    with pytest.raises(ConfigError, match=r"-m in one of 2 processes: .* --array=0-1"):
        command.sweep(overrides(tmp_path), Launch(rank=0, world_size=2))


def test_several_devices_are_started_by_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = compose.checked_config
    monkeypatch.setattr(sweep, "checked_config", lambda overrides, need_files=False: check(overrides))
    first, _ = sweep.sweep_runs([*overrides(tmp_path), "trainer.devices=2"])
    started = command.command(first)
    assert started[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert started[5:8] == ["-m", "hybridprune_megatron.commands.door", "finetune"]
    assert json.dumps(started[8:]) == json.dumps(list(first.overrides))
