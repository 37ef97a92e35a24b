"""Bootstrap intervals against what is known of a proportion."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest

from studies.needles.intervals import accuracy, difference


def row(correct: str) -> dict[str, Any]:
    return {"correct": correct}


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    estimate = accuracy([row("1" * 80 + "0" * 120)])
    half = 1.96 * sqrt(0.4 * 0.6 / 200)
    assert estimate.mean == 0.4
    assert estimate.low == pytest.approx(0.4 - half, abs=0.01)
    assert estimate.high == pytest.approx(0.4 + half, abs=0.01)


def test_seeds_of_a_sample_are_not_independent() -> None:
    one = accuracy([row("10" * 50)])
    three = accuracy([row("10" * 50)] * 3)
    assert (three.low, three.high, three.seeds) == (one.low, one.high, 3)


def test_a_difference_is_paired() -> None:
    rows, others = [row("1110" * 50)], [row("1100" * 50)]
    gap = difference(rows, others)
    assert gap.mean == 0.25
    # A quarter of the samples differ, all in one direction.
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * sqrt(0.25 * 0.75 / 200), abs=0.02)
    assert gap.excludes_zero
    same = difference(rows, rows)
    assert (same.mean, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)


def test_the_same_rows_give_the_same_interval() -> None:
    assert accuracy([row("1011" * 10)]) == accuracy([row("1011" * 10)])
