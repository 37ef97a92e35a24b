"""A run that is killed and started again writes the same digits as one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.engine.run_lock import hold_folder, release_folder
from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world

_KILLED = "died without an error message"


def _digits(rows: list[dict[str, Any]]) -> list[tuple]:
    """What must not differ by a single digit, as text."""
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), repr(row["lr"]), row["samples"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    rows = run_world(1, run_job, tiny_job(tmp_path_factory.mktemp("whole")))[0]
    assert [row["step"] for row in rows] == list(range(1, 9))
    return _digits(rows)


def test_training_lowers_the_loss(undisturbed: list[tuple]) -> None:
    assert float(undisturbed[-1][1]) < float(undisturbed[0][1])


@pytest.mark.parametrize("kill_at", ["step:2", "save:3", "step:7"])
def test_killed_run_goes_on_digit_for_digit(tmp_path: Path, undisturbed: list[tuple], kill_at: str) -> None:
    job = tiny_job(tmp_path)
    with pytest.raises(AssertionError, match=_KILLED):
        run_world(1, run_job, job, 0.1, kill_at)
    if kill_at.startswith("save"):
        assert list((tmp_path / "checkpoints").glob("*.incomplete"))
    rows = run_world(1, run_job, job)[0]
    assert _digits(rows) == undisturbed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000006",
        "step_00000008",
    ]


def test_run_killed_twice(tmp_path: Path, undisturbed: list[tuple]) -> None:
    job = tiny_job(tmp_path)
    for kill_at in ("save:6", "step:5"):
        with pytest.raises(AssertionError, match=_KILLED):
            run_world(1, run_job, job, 0.1, kill_at)
    assert _digits(run_world(1, run_job, job)[0]) == undisturbed


def test_a_folder_that_another_process_writes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    hold_folder(tmp_path)
    try:
        with pytest.raises(AssertionError, match="writes this folder; wait for its end"):
            run_world(1, run_job, tiny_job(tmp_path), 0.1, "", True)
    finally:
        release_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_two_replicas_and_nemo(tmp_path: Path) -> None:
    whole = run_world(2, run_job, tiny_job(tmp_path / "whole"), 0.1, "", True)
    assert whole[0] == whole[1]
    job = tiny_job(tmp_path / "killed")
    with pytest.raises(AssertionError, match=_KILLED):
        run_world(2, run_job, job, 0.1, "step:5", True)
    # What is not the step log's business stays where it is when NeMo tidies up its folder.
    (tmp_path / "killed" / "report.json").write_text("{}")
    resumed = run_world(2, run_job, job, 0.1, "", True)
    assert _digits(resumed[0]) == _digits(whole[0])
    assert (tmp_path / "killed" / "report.json").exists()
    assert list((tmp_path / "killed" / "logs").glob("events.out.tfevents*"))
    run = json.loads((tmp_path / "killed/checkpoints/step_00000008/run.json").read_text())
    assert (run["step"], run["consumed_samples"], run["world_size"]) == (8, 16, 2)


def test_finished_run_stays_finished(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=3)
    first = run_world(1, run_job, job)[0]
    assert run_world(1, run_job, job)[0] == first
