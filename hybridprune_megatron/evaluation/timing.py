"""Seconds of what takes turns, on a processor or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def in_turn(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one round that is not counted.

    In turn, so that a machine that slows down meanwhile slows all candidates.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            seconds = _seconds(run)
            if turn:
                taken[name].append(seconds)
    return taken


def _seconds(run: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for what was started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
