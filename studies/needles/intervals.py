"""Accuracies with intervals: bootstrap over held-out samples, all seeds of a sample drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridprune_megatron.evaluation.intervals import bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap interval, all as shares.

    Attributes:
        mean: over samples and seeds.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
        seeds: number of seeds that it is from.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is beyond its interval."""
        return self.low > 0 or self.high < 0


def accuracy(rows: Sequence[dict[str, Any]]) -> Estimate:
    """Accuracy of one cell.

    Args:
        rows: one per seed; "correct" holds a 0 or 1 for every held-out sample, in the same order in all rows.
    """
    return mean_of(_right(rows), len(rows))


def difference(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Estimate:
    """Accuracy of one cell minus that of another on the same samples, paired sample by sample."""
    return mean_of(_right(rows) - _right(others), min(len(rows), len(others)))


def _right(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Share of seeds that answer each sample right: [samples]."""
    return np.mean([[int(mark) for mark in row["correct"]] for row in rows], axis=0)


def mean_of(values: np.ndarray, seeds: int = 1) -> Estimate:
    """Mean of a number per sample.

    Args:
        values: [samples].
        seeds: that each number is the mean of.
    """
    found = bootstrap(values)
    return Estimate(found.mean, found.low, found.high, seeds)
