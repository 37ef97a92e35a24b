"""The solved schedule against all schedules there are."""

from __future__ import annotations

import itertools
import random

import pytest

from hybridprune_megatron.method.solver import least_damage

LEVELS = (0.75, 0.5, 0.25, 0.05)


def every_schedule(num_layers: int, dropping: set[int]) -> list[tuple[float, ...]]:
    """All falling lists of levels that fall only after layers that may drop."""
    found = []
    for shares in itertools.product((1.0, *LEVELS), repeat=num_layers):
        steps = list(itertools.pairwise(shares))
        if shares[0] == 1.0 and all(b <= a and (a == b or layer in dropping) for layer, (a, b) in enumerate(steps)):
            found.append(shares)
    return found


def damage_of(shares: tuple[float, ...], damages: dict[int, list[float]]) -> float:
    total = 0.0
    for layer, (before, after) in enumerate(itertools.pairwise(shares)):
        if after < before:
            row = dict(zip((1.0, *LEVELS), [0.0, *damages[layer]]))
            total += row[after] - row[before]
    return total


@pytest.mark.parametrize("seed", range(30))
def test_the_path_is_the_best_of_all_schedules(seed: int) -> None:
    """Four layers that may drop by four levels, among six; damages are noisy, so some increments are negative."""
    numbers = random.Random(seed)
    dropping = {0, 1, 2, 3} if seed % 2 else {0, 2, 3, 4}
    damages = {layer: [numbers.uniform(-0.1, 1) * (1 - level) for level in LEVELS] for layer in dropping}
    weights = [numbers.choice((1.0, 2.0)) for _ in range(6)]
    costs = [[weight * share for share in (1.0, *LEVELS)] for weight in weights]
    for budget in (0.3, 0.45, 0.8, 1.0):
        limit = budget * sum(weights)
        allowed = [
            each
            for each in every_schedule(6, dropping)
            if sum(weight * share for weight, share in zip(weights, each)) <= limit + 1e-9
        ]
        if not allowed:
            with pytest.raises(ValueError, match="the cheapest costs"):
                least_damage(damages, LEVELS, costs, limit)
            continue
        best = min(damage_of(each, damages) for each in allowed)
        # Costs are multiples of 0.05, so 0.05 is counted without rounding.
        found = least_damage(damages, LEVELS, costs, limit, steps=round(limit / 0.05))
        assert found.damage == pytest.approx(best)
        assert damage_of(found.retention, damages) == pytest.approx(best)
        assert found.retention in allowed


def test_costs_are_rounded_against_the_schedule() -> None:
    """However coarse the steps, the limit holds."""
    damages = {layer: [1 - level for level in LEVELS] for layer in range(8)}
    costs = [[share, *LEVELS] for share in [1.0] * 9]
    for steps in (20, 77, 4000):
        found = least_damage(damages, LEVELS, costs, 9 * 0.4, steps)
        assert sum(found.retention) <= 9 * 0.4 + 1e-9
