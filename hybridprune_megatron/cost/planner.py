"""The inverse of the cost model: the largest budget that reaches a target.

Budgets are searched on a grid of four decimals, so that the override that is printed is exactly the one that was
counted. What a target asks for only gets easier with a smaller budget, until a budget is so small that the configured
layers cannot reach it; so bisection finds both.
"""

from __future__ import annotations

from collections.abc import Callable

# Budgets are multiples of one over this.
GRID = 10_000
Retention = tuple[float, ...]


def largest_budget(
    retention_at: Callable[[float], Retention], reached: Callable[[float], bool], highest: float = 1.0
) -> float | None:
    """The largest budget that has a schedule and reaches a target; None if none does.

    Args:
        retention_at: retention per layer at a budget; raises ``ValueError`` below the smallest that has a schedule.
        reached: whether a budget reaches the target; true for all budgets below one that does.
        highest: the largest budget there is (1, or what a reduction before the model passes on).
    """
    top = round(highest * GRID)

    def missed(step: int) -> bool:
        return _exists(retention_at, step) and not reached(step / GRID)

    step = _first_step(missed, 1, top + 1) - 1
    return step / GRID if step and _exists(retention_at, step) else None


def smallest_budget(retention_at: Callable[[float], Retention], highest: float = 1.0) -> float:
    """The smallest budget that has a schedule: everything is dropped at the first chance; arguments as above."""
    return _first_step(lambda step: _exists(retention_at, step), 1, round(highest * GRID)) / GRID


def _exists(retention_at: Callable[[float], Retention], step: int) -> bool:
    try:
        retention_at(step / GRID)
    except ValueError:
        return False
    return True


def _first_step(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest from ``low`` to ``high`` where a condition holds that stays true once it is; it does at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
