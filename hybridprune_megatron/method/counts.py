"""Kept counts from retention: how many visual tokens of every sample enter each layer.

Plain python on the host, so that every shape is known before the device has computed anything and every rank, pipeline
stage and recomputation finds the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

# Sums of shares times tokens are exact up to this.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class PackSizes:
    """What decides how much work a packed sequence is; known on the host.

    Attributes:
        visual: S visual tokens of the samples before any reduction.
        text: S numbers of all their other tokens.
        question: S numbers of those of them that score.
        loss_rows: tokens of all samples with a loss.
        frames: frames of all samples.
        encoded: of these, frames that run through the tower; the others come as its features.
        retentions: S shares per layer; None: the model's own for all.
    """

    visual: tuple[int, ...]
    text: tuple[int, ...]
    question: tuple[int, ...]
    loss_rows: int
    frames: int
    encoded: int
    retentions: tuple[tuple[float, ...], ...] | None = None


@lru_cache(maxsize=4096)
def kept_counts(retention: tuple[float, ...], num_visual: int, min_tokens: int = 1) -> tuple[int, ...]:
    """Visual tokens of one sample that enter every layer.

    Args:
        retention: share per layer, never rising, from ``retention_by_layer``.
        num_visual: visual tokens of the sample before any reduction.
        min_tokens: smallest number kept (all, if the sample has fewer).

    Returns:
        One count per layer, never rising; see ``rounded`` for how their sum meets the budget.
    """
    lowest = min(min_tokens, num_visual)
    return rounded(_wanted(retention, num_visual, lowest), num_visual, lowest)


def packed_counts(
    retentions: Sequence[tuple[float, ...]],
    visual_counts: Sequence[int],
    num_text: int,
    min_tokens: int = 1,
    multiple_of: int = 1,
) -> list[tuple[int, ...]]:
    """Visual tokens of every sample of a packed sequence that enter every layer.

    With ``multiple_of`` 1 every sample has the counts it has alone. Otherwise the packed length divides at every depth:
    the totals are rounded as in ``rounded``, and each is shared among the samples by largest remainder.

    Args:
        retentions: share per layer for every sample.
        visual_counts: S visual tokens before any reduction.
        num_text: all other tokens of the packed sequence; they never change.
        min_tokens: smallest number kept per sample (all, if it has fewer).
        multiple_of: what the packed length must divide by.

    Returns:
        Per layer S counts; those of a sample never rise.

    Raises:
        ValueError: the packed length before any reduction does not divide.
    """
    if multiple_of == 1:
        alone = [kept_counts(*each, min_tokens) for each in zip(retentions, visual_counts)]
        return list(zip(*alone))
    highest = sum(visual_counts)
    if (num_text + highest) % multiple_of:
        raise ValueError(
            f"packed sequence of {num_text + highest} tokens does not divide by {multiple_of}: pad it when packing"
        )
    lowest = [min(min_tokens, count) for count in visual_counts]
    wanted = list(zip(*(_wanted(*each) for each in zip(retentions, visual_counts, lowest))))
    totals = rounded([sum(layer) for layer in wanted], highest, sum(lowest), multiple_of, -num_text % multiple_of)
    counts = [tuple(visual_counts)]
    for layer, total in zip(wanted, totals):
        counts.append(_share(total, layer, lowest, counts[-1]))
    return counts[1:]


def _wanted(retention: Sequence[float], num_visual: int, lowest: int) -> list[float]:
    """Tokens that should enter every layer, before rounding."""
    return [max(share * num_visual, lowest) for share in retention]


def _share(total: int, wanted: Sequence[float], lowest: Sequence[int], highest: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers near the wanted ones, within bounds, that sum to the total: largest remainder, earlier on ties."""
    counts = [max(low, min(high, math.floor(want))) for want, low, high in zip(wanted, lowest, highest)]
    samples = range(len(counts))
    missing = total - sum(counts)
    for _ in range(missing):
        sample = max((s for s in samples if counts[s] < highest[s]), key=lambda s: wanted[s] - counts[s])
        counts[sample] += 1
    for _ in range(-missing):
        sample = min((s for s in samples if counts[s] > lowest[s]), key=lambda s: wanted[s] - counts[s])
        counts[sample] -= 1
    return tuple(counts)


def rounded(
    wanted: Sequence[float], highest: int, lowest: int, multiple_of: int = 1, remainder: int = 0
) -> tuple[int, ...]:
    """Whole numbers near falling ones, also falling, whose sum comes near to theirs from below.

    All are rounded down; then those that lost most go up again, layers that want the same together, as long as the sum
    does not exceed the wanted one. So it stays below by less than ``multiple_of`` times the longest stretch of layers
    that want the same, and exceeds it only by what ``lowest`` adds: where rounding up to ``lowest`` takes more than its
    share, the other layers give it back as far as they can.

    Args:
        wanted: one number a layer, never rising, from ``lowest`` to ``highest``. Layers that want ``highest`` get it:
            nothing is dropped before them.
        highest: upper bound, of the right remainder itself.
        lowest: lower bound.
        multiple_of: the results leave ``remainder`` when divided by it.
        remainder: see there.
    """
    stretches = [(value, len(list(run))) for value, run in groupby(wanted)]
    free = [index for index, (value, _) in enumerate(stretches) if value != highest]
    least = lowest + (remainder - lowest) % multiple_of
    counts = [
        max(least, remainder + math.floor((value - remainder) / multiple_of) * multiple_of) for value, _ in stretches
    ]
    spare = _ROUNDING + sum(length * (value - count) for (value, length), count in zip(stretches, counts))

    def lost(index: int) -> float:
        return stretches[index][0] - counts[index]

    def may_fall(index: int) -> bool:
        return counts[index] - multiple_of >= (counts[index + 1] if index + 1 < len(counts) else least)

    def may_rise(index: int) -> bool:
        fits = stretches[index][1] * multiple_of <= spare
        return fits and lost(index) > 0 and counts[index] + multiple_of <= (counts[index - 1] if index else highest)

    while spare < 0 and (able := [index for index in free if may_fall(index)]):
        index = min(able, key=lambda index: (lost(index), -index))
        counts[index] -= multiple_of
        spare += stretches[index][1] * multiple_of
    while able := [index for index in free if may_rise(index)]:
        index = max(able, key=lambda index: (lost(index), -index))
        counts[index] += multiple_of
        spare -= stretches[index][1] * multiple_of
    return tuple(count for count, (_, length) in zip(counts, stretches) for _ in range(length))
