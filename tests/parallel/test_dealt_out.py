"""Frames dealt out to tensor- and context-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.run import own_device
from tests.worlds import run_world


def _dealt(numbers: list[int]) -> list[tuple[int, list[float], list[float]]]:
    """For each number of items: how many this rank worked on, the results, and the gradient of the items."""
    from hybridprune_megatron.models.context import dealt_out

    device, rank = own_device(), dist.get_rank()
    # As megatron cuts four ranks into two tensor- and two context-parallel ones.
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    found = []
    for number in numbers:
        worked: list[int] = []

        def work(part: torch.Tensor, worked: list[int] = worked) -> torch.Tensor:
            worked.append(len(part))
            return part * part

        items = torch.arange(1.0, number + 1, device=device).view(-1, 1).requires_grad_()
        results = dealt_out(work, items, [dist.group.WORLD, pairs[rank % 2]])
        (results * (rank + 1)).sum().backward()
        assert items.grad is not None
        found.append((sum(worked), results.flatten().tolist(), items.grad.flatten().tolist()))
    return found


def test_items_are_dealt_to_the_largest_group_that_has_work_for_all():
    numbers = [1, 2, 3, 4, 7]
    ranks: list[Any] = run_world(4, _dealt, numbers)
    worked = [[rank[case][0] for rank in ranks] for case in range(len(numbers))]
    # One item: every rank alone. Two and three: in each pair. From four on: all four.
    assert worked == [[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1], [2, 2, 2, 1]]
    for case, number in enumerate(numbers):
        for rank in ranks:
            assert rank[case][1] == [item**2 for item in range(1, number + 1)]
        # Each pair, or all four, add up what they ask of an item: ranks 0 and 2 1 + 3, ranks 1 and 3 2 + 4, all 10.
        asked = {1: [1, 2, 3, 4], 2: [4, 6, 4, 6], 3: [4, 6, 4, 6]}.get(number, [10] * 4)
        for rank, weight in zip(ranks, asked):
            dealt_here = [gradient / (2 * item) for item, gradient in enumerate(rank[case][2], 1) if gradient]
            assert dealt_here == pytest.approx([weight] * rank[case][0])
