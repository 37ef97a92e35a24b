"""Ranks that end in order do not take one another for dead."""

from __future__ import annotations

import time

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
