"""Random budgets for finetuning: one checkpoint that serves every rate has seen every rate.

A draw is a pure function of (seed, step, sample): recomputation, a resumed run, tensor-parallel ranks and any number of
replicas draw alike, and nothing has to be saved. Plain python on the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DISTRIBUTIONS = ("fixed", "uniform", "loguniform", "choice")
#: Distinct budgets of a continuous distribution: its evenly spaced quantiles, both ends included. So few that every
#: schedule is solved once in a run.
NUM_LEVELS = 64
_BITS = 64


def budget_levels(
    distribution: str, low: float = 1.0, high: float = 1.0, choices: Sequence[float] = ()
) -> tuple[float, ...]:
    """The budgets that are drawn, all equally likely, rising for a continuous distribution.

    Args:
        distribution: "uniform" (even steps from low to high), "loguniform" (even ratios), "choice" (a list).
        low: smallest budget, in (0, 1].
        high: largest budget, at least ``low``.
        choices: the budgets of "choice"; one that is named twice is twice as likely.

    Raises:
        ValueError: another distribution.
    """
    if distribution == "choice":
        return tuple(choices)
    fractions = [level / (NUM_LEVELS - 1) for level in range(1, NUM_LEVELS - 1)]
    if distribution == "uniform":
        between = [low + (high - low) * fraction for fraction in fractions]
    elif distribution == "loguniform":
        between = [low * (high / low) ** fraction for fraction in fractions]
    else:
        raise ValueError(f"tuning.budget.distribution={distribution!r}: allowed are {', '.join(DISTRIBUTIONS[1:])}")
    # The ends as they were given: a budget of 1 must be 1 to the bit to drop nothing.
    return (low, *between, high)


def draw_budget(levels: Sequence[float], seed: int, step: int, key: str = "") -> float:
    """One of the levels, by a hash of (seed, step, key).

    Args:
        levels: from ``budget_levels``.
        seed: of the run.
        step: optimizer step.
        key: of the sample; "" draws for all samples of the step at once.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{key}".encode(), digest_size=_BITS // 8).digest()
    # In whole numbers, so that no machine rounds differently.
    return levels[int.from_bytes(digest, "little") * len(levels) >> _BITS]
