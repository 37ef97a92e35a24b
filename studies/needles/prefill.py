"""Measured prefill of the study's methods: each against the same model with every token, in turn on the same clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.needles.cells import BUDGETS, METHODS, Unit
from studies.needles.report import timing_key
from studies.needles.rows import Rows
from studies.needles.run import Runner

NUM_CLIPS = 2
ROUNDS = 5


def time_methods(runner: Runner, path: Path, settings: dict[str, Any], progress: Any) -> dict[str, dict[str, Any]]:
    """Times whatever has no row yet.

    Args:
        runner: builds the model with the base weights.
        path: of the rows.
        settings: see ``Rows``.
        progress: wraps the list of what is left, e.g. tqdm.

    Returns:
        Rows by ``timing_key``: median seconds with every token and reduced, of ``NUM_CLIPS`` clips in one batch.
    """
    rows = Rows(path, settings | {"clips": NUM_CLIPS, "rounds": ROUNDS, "threads": runner.threads})
    wanted = [
        (method, budget) for budget in BUDGETS for method in METHODS if budget == BUDGETS[0] or not method.headline_only
    ]
    left = [(method, budget) for method, budget in wanted if timing_key(method.name, budget) not in rows.by_key]
    for method, budget in progress(left):
        full, reduced = runner.time(Unit("before", method.name, 0, (budget,)), budget, NUM_CLIPS, ROUNDS)
        key = timing_key(method.name, budget)
        rows.add({"key": key, "full_seconds": full, "reduced_seconds": reduced})
    return rows.by_key
