"""Random budgets: their levels, that a draw depends on nothing but its arguments, and that draws are even."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from hybridprune_megatron.method.budgets import NUM_LEVELS, budget_levels, draw_budget


def test_uniform_levels_are_even_steps_between_the_ends():
    levels = budget_levels("uniform", 0.15, 1.0)
    assert (levels[0], levels[-1], len(levels)) == (0.15, 1.0, NUM_LEVELS)
    steps = [after - before for before, after in pairwise(levels)]
    assert steps == pytest.approx([0.85 / 63] * 63)


def test_loguniform_levels_are_even_ratios_between_the_ends():
    levels = budget_levels("loguniform", 0.1, 0.9)
    assert (levels[0], levels[-1], len(levels)) == (0.1, 0.9, NUM_LEVELS)
    ratios = [after / before for before, after in pairwise(levels)]
    assert ratios == pytest.approx([9 ** (1 / 63)] * 63)


def test_choices_are_the_levels():
    assert budget_levels("choice", choices=[0.5, 0.25, 1.0]) == (0.5, 0.25, 1.0)
    with pytest.raises(ValueError, match=r"distribution='normal': allowed are uniform, loguniform, choice"):
        budget_levels("normal", 0.1, 0.9)


def test_a_draw_never_changes():
    """Written down once: another machine, version or process draws the same."""
    levels = budget_levels("choice", choices=[float(level) for level in range(1000)])
    draws = [draw_budget(levels, seed, step, key) for seed, step, key in ((1, 1, "a"), (2, 1, "a"), (1, 2, "a"))]
    assert draws == [603.0, 42.0, 207.0]
    assert draw_budget(levels, 1, 11, "1") != draw_budget(levels, 11, 1, "1")


def test_draws_are_even_over_samples_and_over_steps():
    levels = budget_levels("uniform", 0.2, 1.0)
    for draws in (
        [draw_budget(levels, 7, 3, f"{sample:06d}") for sample in range(6400)],
        [draw_budget(levels, 7, step) for step in range(6400)],
    ):
        counts = Counter(draws)
        assert set(counts) == set(levels)
        # 100 expected at every level, deviation 10.
        assert min(counts.values()) > 50
        assert max(counts.values()) < 150
