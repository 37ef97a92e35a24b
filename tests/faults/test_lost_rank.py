"""One process of a job is killed or stuck: the job ends soon, and says which one and why."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.job import run_job, tiny_job
from tests.faults.run import run_with_stderr
from tests.worlds import run_world


def _end(tmp_path: Path, lost: int, how: signal.Signals, **trainer: Any) -> tuple[str, float]:
    """What the rank that is left says, and the seconds from the fault (the last step's row) to its end."""
    with pytest.raises(AssertionError, match="died without an error message"):
        run_world(2, run_with_stderr, tiny_job(tmp_path, **trainer), tmp_path, lost, how)
    seconds = time.time() - (tmp_path / "train_log.jsonl").stat().st_mtime
    return (tmp_path / str(1 - lost)).read_text(), seconds


@pytest.mark.parametrize("lost", [1, 0])
def test_killed_rank_ends_the_job_with_its_name(tmp_path: Path, lost: int) -> None:
    said, _ = _end(tmp_path, lost, signal.SIGKILL)
    name = "rank 1 (" if lost else "rank 0 died"
    line = next(line for line in said.splitlines() if line.startswith("job ended: "))
    assert line.startswith(f"job ended: {name}")
    assert "died without an error message (killed, out of memory, or its machine is gone)" in line
    assert "Traceback" not in said
    rows = run_world(2, run_job, tiny_job(tmp_path))[0]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_stuck_rank_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    said, seconds = _end(tmp_path, 1, signal.SIGSTOP, timeout_minutes=0.1)
    line = next(line for line in said.splitlines() if line.startswith("job ended: "))
    assert " timed out waiting for the others (" in line
    assert "; nothing heard from rank 1 (" in line
    # Six seconds, the second in which rank 0 listens, and what a busy machine takes.
    assert 6 <= seconds < 60
