"""Means over samples with their bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
#: Numbers of one block of draws, which bounds its memory whatever the number of samples.
_BLOCK = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval.

    Attributes:
        mean: over samples.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Mean of a number per sample; the same samples give the same interval.

    Args:
        values: [samples], at least one.
        weights: [samples], above 0: the mean is ``sum(values) / sum(weights)``, both drawn together; None: 1 each.
    """
    count = len(values)
    weights = np.ones(count) if weights is None else weights
    rng = np.random.default_rng(0)
    means, block = [], max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        # Drawing how often each sample comes is the same as drawing samples, in one matrix product.
        draws = rng.multinomial(count, np.full(count, 1 / count), size=min(block, RESAMPLES - start))
        means.append((draws @ values) / (draws @ weights))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.sum() / weights.sum()), float(low), float(high))
