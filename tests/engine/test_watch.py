"""Ranks that end in order do not take one another for dead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.worlds import run_world


def _end(late: int) -> str:
    import torch.distributed as dist

    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.watch import start_watch

    rank, size = dist.get_rank(), dist.get_world_size()
    start_watch(Launch(rank, size, rank, size))
    if rank == late:
        time.sleep(3)
    # The world's shut_down() follows.
    return f"rank {rank} is done"


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_may_end_later_than_the_others(late: int) -> None:
    assert run_world(2, _end, late) == ["rank 0 is done", "rank 1 is done"]


def _lose(lost: int, reason: str, bad: str) -> None:
    import torch.distributed as dist

    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.watch import report_failure, start_watch

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"BAD_NODE_FILE": bad, "SLURMD_NODENAME": f"n{rank}"}
    start_watch(Launch(rank, size, rank, size))
    if rank == lost and not reason:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == lost:
        error = RuntimeError(reason)
        report_failure(error)
        time.sleep(3)
        raise error
    time.sleep(60)


@pytest.mark.parametrize(
    ("lost", "reason", "written"),
    [
        (1, "", "n1 silent rank 1 ("),
        (0, "", "n0 silent rank 0 died without an error message"),
        (1, "CUDA error: uncorrectable ECC error encountered", "n1 hardware rank 1 ("),
        (1, "CUDA error: device-side assert triggered", ""),
    ],
)
def test_the_node_of_a_lost_rank_is_written_down(tmp_path: Path, lost: int, reason: str, written: str) -> None:
    bad = tmp_path / "bad"
    with pytest.raises(AssertionError):
        run_world(2, _lose, lost, reason, str(bad))
    text = bad.read_text() if bad.exists() else ""
    assert text.startswith(written)
    assert bool(text) == bool(written)
    assert text.count("\n") == bool(written)
