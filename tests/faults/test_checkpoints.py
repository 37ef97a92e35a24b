"""What happens to a run when its checkpoints cannot be written, or are damaged behind its back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.checkpoint_folder import complete_checkpoints, resume_point
from tests.engine.job import run_job, tiny_job
from tests.faults.run import run_and_tell, run_on_full_disk, run_with_gate
from tests.worlds import run_world


def _digits(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), row["samples"]) for row in rows]


def _names(folder: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(folder / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return _digits(run_world(1, run_job, tiny_job(tmp_path_factory.mktemp("whole")))[0])


@pytest.mark.parametrize("what", ["shard", "run.json", "metadata.json"])
def test_truncated_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, undisturbed: list[tuple[Any, ...]], what: str
) -> None:
    run_world(1, run_job, tiny_job(tmp_path, max_steps=7), 0.1)
    newest = tmp_path / "checkpoints" / "step_00000007"
    path = next(newest.glob("*.distcp")) if what == "shard" else newest / what
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if what == "metadata.json":
        path.unlink()
    rows, printed = run_world(1, run_and_tell, tiny_job(tmp_path))[0]
    assert f"{newest} is damaged ({path.name} " in printed
    assert f"resuming from {newest.with_name('step_00000006')}\n" in printed
    # The schedule ends at max_steps; the same number of steps has the same digits.
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert _names(tmp_path) == ["step_00000006", "step_00000008"]


def test_no_whole_checkpoint_is_no_new_start(tmp_path: Path) -> None:
    for step in (3, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
    with pytest.raises(ValueError, match=r"00000006 is damaged \(metadata.json is missing\).*: no whole checkpoint"):
        resume_point(tmp_path)


@pytest.mark.parametrize(
    ("processes", "rank", "background", "what"),
    [
        (1, 0, False, "weights"),
        (2, 1, False, "weights"),
        (1, 0, True, "weights"),
        (1, 0, False, "torch"),
        (1, 0, True, "torch"),
        (1, 0, False, "metadata.json"),
    ],
)
def test_full_disk_leaves_the_former_checkpoint(
    tmp_path: Path, processes: int, rank: int, background: bool, what: str
) -> None:
    job = tiny_job(tmp_path, async_save=background)
    message = (
        r"RuntimeError: checkpoint step_00000006 in \S*checkpoints could not be written: .*"
        r"(disk full|No space left).*; "
        r"the newest whole one is step_00000003; make room"
    )
    with pytest.raises(AssertionError, match=message):
        run_world(processes, run_on_full_disk, job, 6, rank, what)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    rows = run_world(processes, run_job, job)[0]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    job = tiny_job(tmp_path, async_save=True)
    rows, complete = run_world(1, run_with_gate, job, 3, tmp_path / "gate", "")[0]
    # Two steps later the checkpoint is not there.
    assert complete == []
    assert _digits(rows) == undisturbed
    assert _names(tmp_path) == ["step_00000006", "step_00000008"]


def test_background_save_holds_the_values_of_its_step(tmp_path: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    """The writer of step 3 works after steps 4 and 5 have changed the weights; the run dies in step 6."""
    job = tiny_job(tmp_path, async_save=True)
    with pytest.raises(AssertionError, match="died without an error message"):
        run_world(1, run_with_gate_then_die, job, tmp_path / "gate")
    assert _names(tmp_path) == ["step_00000003"]
    assert _digits(run_world(1, run_job, job)[0]) == undisturbed


def run_with_gate_then_die(job: Any, gate: Path) -> None:
    import os
    import signal

    from hybridprune_megatron.engine.strategy import MegatronStrategy

    finish = MegatronStrategy.finish_save

    def finish_and_die(self: Any, wait: bool) -> None:
        # Before step 6 the save is waited for, then the process is gone.
        gone = gate.exists()
        finish(self, wait or gone)
        if gone:
            os.kill(os.getpid(), signal.SIGKILL)

    MegatronStrategy.finish_save = finish_and_die  # type: ignore[method-assign]
    run_with_gate(job, 3, gate, "")


def test_crash_during_a_background_save_leaves_the_former_one(
    tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    job = tiny_job(tmp_path, async_save=True)
    with pytest.raises(AssertionError, match="died without an error message"):
        run_world(1, run_with_gate, job, 6, tmp_path / "gate", "step:8")
    assert _names(tmp_path) == ["step_00000003"]
    assert list((tmp_path / "checkpoints").glob("step_00000006.*.incomplete"))
    assert _digits(run_world(1, run_job, job)[0]) == undisturbed
