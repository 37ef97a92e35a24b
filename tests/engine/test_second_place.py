"""Copies of checkpoints on another disk: whole or not there, and never the end of a run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.checkpoint_folder import newest_of_run, own_copies
from hybridprune_megatron.engine.second_place import SecondPlace
from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world

RUN = "runs/mine"


def _checkpoint(folder: Path, step: int, output_dir: str = RUN) -> Path:
    """What counts as a whole one."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(step))
    (path / "metadata.json").write_text("{}")
    content = {"step": step, "files": {"weights": step, "metadata.json": 2}, "config": {"output_dir": output_dir}}
    (path / "run.json").write_text(json.dumps(content))
    return path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _copied(second: Path, checkpoints: list[Path], **keep: int) -> SecondPlace:
    place = SecondPlace(second, RUN, keep.get("last", 2), keep.get("every", 0))
    for checkpoint in checkpoints:
        place.copy(checkpoint, keep.get("best"))
        place.finish()
    return place


def test_as_many_copies_stay_as_checkpoints(tmp_path: Path) -> None:
    second = tmp_path / "second"
    checkpoints = [_checkpoint(tmp_path / "first", step) for step in (10, 20, 30, 40, 50)]
    place = _copied(second, checkpoints, last=2, every=20, best=10)
    assert (place.made, place.failed) == (5, 0)
    assert _names(second) == ["step_00000010", "step_00000020", "step_00000040", "step_00000050"]
    for path in own_copies(second, RUN):
        assert {file.name: file.read_bytes() for file in path.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "first" / path.name).iterdir()
        }
    # A copy that is there is not made again.
    assert _copied(second, checkpoints[-1:], last=9).made == 0


def test_what_others_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = tmp_path / "second"
    theirs = [_checkpoint(second, step, "runs/theirs") for step in (10, 20, 30)]
    (second / "step_00000020.12345678.incomplete").mkdir()
    place = _copied(second, [_checkpoint(tmp_path / "first", step) for step in (30, 40, 50)], last=1)
    assert (place.made, place.failed) == (2, 1)
    assert "step_00000030 is not copied to trainer.copy_checkpoints_to=" in capsys.readouterr().out
    assert all(json.loads((path / "run.json").read_text())["config"]["output_dir"] == "runs/theirs" for path in theirs)
    assert _names(second)[-1] == "step_00000050"
    assert "step_00000020.12345678.incomplete" in _names(second)
    assert "step_00000040" not in _names(second)


def test_a_full_or_missing_disk_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, second = _checkpoint(tmp_path / "first", 10), tmp_path / "second"

    def full(_: Path, scratch: Path) -> None:
        scratch.mkdir()
        (scratch / "weights").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        place = _copied(second, [checkpoint])
    assert (place.made, place.failed) == (0, 1)
    assert not list(second.iterdir())
    where = f"trainer.copy_checkpoints_to={second}"
    assert capsys.readouterr().out.splitlines() == [
        f"step_00000010 is not copied to {where} (No space left on device); failed so far: 1",
        f"copies of checkpoints in {second}: 0 made, 1 failed",
    ]
    # The next one is tried again; and a disk that is not mounted is not written below its mount point.
    place.copy(checkpoint)
    place.finish()
    assert (place.made, place.failed) == (1, 1)
    gone = _copied(tmp_path / "not_mounted" / "copies", [checkpoint])
    assert gone.failed == 1
    assert not (tmp_path / "not_mounted").exists()


def test_the_newest_of_both_places(tmp_path: Path) -> None:
    run, second = tmp_path / "run", tmp_path / "second"
    cfg = load_config([f"output_dir={run}", f"trainer.copy_checkpoints_to={second}"])
    assert newest_of_run(cfg) is None
    _checkpoint(second, 90, "runs/theirs")
    first = _checkpoint(run / "checkpoints", 20, str(run))
    copy = _checkpoint(second, 20, str(run))
    # Its own folder is nearer.
    assert newest_of_run(cfg) == first
    newer = _checkpoint(second, 30, str(run))
    assert newest_of_run(cfg) == newer
    (newer / "weights").write_bytes(b"cut")
    assert newest_of_run(cfg) == first
    (first / "run.json").unlink()
    assert newest_of_run(cfg) == copy


def _digits(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), row["samples"]) for row in rows]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_disk_was_lost_continues_from_the_copy(tmp_path: Path, asynchronous: bool) -> None:
    whole = _digits(run_world(1, run_job, tiny_job(tmp_path / "whole"))[0])
    run, second = tmp_path / "run", tmp_path / "second"
    job = tiny_job(run, copy_checkpoints_to=str(second), async_save=asynchronous, max_steps=6)
    run_world(2, run_job, job)
    assert _names(second) == _names(run / "checkpoints") == ["step_00000003", "step_00000006"]
    shutil.rmtree(run / "checkpoints")
    job.trainer.max_steps = 8
    rows = run_world(1, run_job, job)[0]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row[3] for row in _digits(rows)] == [row[3] for row in whole]
    assert _names(second) == ["step_00000006", "step_00000008"]
    assert _names(run / "checkpoints") == ["step_00000008"]


def test_a_run_ends_well_without_its_second_place(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "run", copy_checkpoints_to=str(tmp_path / "not_mounted" / "copies"))
    assert len(run_world(1, run_job, job)[0]) == 8
    assert _names(tmp_path / "run" / "checkpoints") == ["step_00000006", "step_00000008"]
