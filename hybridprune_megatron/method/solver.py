"""Which retention damages the answers least under a budget: a shortest path through measured damages.

The damage of a schedule is taken to be the sum over its drops of ``s(l, q') - s(l, q)``, where ``s(l, q)`` is what the
answers lose if one drop to the share q after layer l is the only one, and q is the share before the drop
(docs/method.md).

Shape letters: N layers, Q levels, R steps of the resource.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Steps in which what is spent is counted. Costs are rounded up, so the limit is never passed.
STEPS = 4000


@dataclass(frozen=True)
class Solution:
    """The best schedule.

    Attributes:
        retention: share of the visual tokens that enters every layer.
        damage: what its drops are predicted to cost.
    """

    retention: tuple[float, ...]
    damage: float


def least_damage(
    damages: Mapping[int, Sequence[float]],
    levels: Sequence[float],
    costs: Sequence[Sequence[float]],
    limit: float,
    steps: int = STEPS,
) -> Solution:
    """The schedule of least damage whose layers together cost no more than a limit.

    Args:
        damages: for every layer that may drop, 0-based, Q numbers ``s(l, q)``, one per level.
        levels: Q shares below 1, falling.
        costs: N rows of Q + 1 numbers, 0 or more: what a layer costs that everything enters, and what it costs at each
            level. For a budget, these shares themselves.
        limit: of the sum of costs over layers; for a budget N times it.
        steps: in which costs are counted; see ``STEPS``.

    Raises:
        ValueError: no schedule costs so little.
    """
    num_states = len(levels) + 1
    # Of each layer that may drop, what a move between states adds; state 0 is everything.
    table = {layer: np.concatenate([[0.0], np.asarray(row, float)]) for layer, row in damages.items()}
    spent = np.ceil(np.asarray(costs, float) / limit * steps - 1e-9).astype(int)
    # best[state, used]: least damage so far, before a layer.
    best = np.full((num_states, steps + 1), np.inf)
    best[0, 0] = 0.0
    came_from: list[np.ndarray] = []
    for layer, price in enumerate(spent):
        for state in range(num_states):
            best[state] = _shifted(best[state], price[state])
        origin = np.repeat(np.arange(num_states)[:, None], steps + 1, axis=1)
        # What is dropped after the last layer saves nothing.
        if layer in table and layer + 1 < len(spent):
            moved = best.copy()
            for target in range(1, num_states):
                for state in range(target):
                    after = best[state] + (table[layer][target] - table[layer][state])
                    better = after < moved[target]
                    moved[target][better], origin[target][better] = after[better], state
            best = moved
        came_from.append(origin)
    state, used = divmod(int(np.argmin(best)), steps + 1)
    damage = float(best[state, used])
    if not np.isfinite(damage):
        cheapest = sum(row[0] if all(each >= layer for each in table) else row[-1] for layer, row in enumerate(costs))
        raise ValueError(f"no schedule of these layers and levels costs {limit:.3f}: the cheapest costs {cheapest:.3f}")
    states = []
    for layer in reversed(range(len(spent))):
        state = int(came_from[layer][state, used])
        used -= int(spent[layer][state])
        states.append(state)
    shares = (1.0, *levels)
    return Solution(tuple(shares[state] for state in reversed(states)), damage)


def _shifted(row: np.ndarray, price: int) -> np.ndarray:
    """[R + 1] after paying a price; what would pass the limit is gone."""
    result = np.full_like(row, np.inf)
    if price < len(row):
        result[price:] = row[: len(row) - price]
    return result
