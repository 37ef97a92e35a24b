"""Retention meets the budget, counts meet the retention, alignment keeps more real tokens."""

import itertools
import math
import random
import re
from itertools import groupby, pairwise
from statistics import fmean

import pytest

from hybridprune_megatron.method.counts import kept_counts, packed_counts, rounded
from hybridprune_megatron.method.schedule import (
    SCHEDULES,
    Cosine,
    Linear,
    Listed,
    Schedule,
    Sigmoid,
    Stages,
    Step,
    reducing_layers,
    retention_by_layer,
)

NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
PATTERNS = [NANO_12B, "M-M*-M-M*-", "M*M*-M"]


SHAPES = [SCHEDULES.build(name) for name in SCHEDULES.names if name != Listed.name]
SHAPES += [Stages(stages=4), Linear(floor=0.1), Cosine(floor=0.02)]
LAYERS = ["all", "attention", "mamba", "every_2", "every_3"]


def solved(pattern: str, budget: float, layers: str, shape: Schedule, first: float = 1.0) -> tuple[float, ...] | None:
    """The retention, or None where the shape cannot drop enough."""
    try:
        return retention_by_layer(pattern, budget, layers, shape, first)
    except ValueError as error:
        # So it says, with a mean that is above the budget.
        lowest = re.search(r"still keeps a mean of ([\d.]+); raise the budget or", str(error))
        if lowest is None or float(lowest.group(1)) < budget - 1e-3:
            raise
        return None


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_retention_is_the_budget(pattern, shape):
    reached = 0
    for layers in LAYERS:
        reducing = reducing_layers(pattern, layers)
        for budget, first in ((0.12, 1.0), (0.25, 1.0), (0.25, 0.4), (0.5, 1.0), (0.5, 0.7), (0.99, 1.0)):
            retention = solved(pattern, budget, layers, shape, first)
            if retention is None:
                continue
            reached += 1
            assert sum(retention) / len(pattern) == pytest.approx(budget, abs=1e-9)
            assert retention[0] == first
            falls = [layer for layer in range(1, len(pattern)) if retention[layer] != retention[layer - 1]]
            assert all(retention[layer] < retention[layer - 1] and layer - 1 in reducing for layer in falls)
    assert reached >= 5


def test_shapes_are_their_formulas():
    """Each at a budget whose solved number is known."""
    pattern = "M" * 11
    depths = [layer / 10 for layer in range(11)]
    for shape, curve in (
        (Linear, lambda x: 1 - x),
        (Cosine, lambda x: (1 + math.cos(math.pi * x)) / 2),
        (Sigmoid, lambda x: (1 + math.exp(-2)) / (1 + math.exp(10 * (x - 0.2)))),
    ):
        wide = [0.3 + 0.7 * curve(x) for x in depths]
        assert retention_by_layer(pattern, fmean(wide), "all", shape(floor=None)) == pytest.approx(wide)
        # With a floor of its own a curve reaches it at the depth that meets the budget, here half.
        narrow = [0.1 + 0.9 * (curve(min(2 * x, 1)) if shape is not Sigmoid else curve(2 * x)) for x in depths]
        assert retention_by_layer(pattern, fmean(narrow), "all", shape(floor=0.1)) == pytest.approx(narrow)
    one_shot = retention_by_layer("M-M*-M-M*-", 0.46, "all", Step(layer=3))
    assert one_shot == pytest.approx((1, 1, 1, 1, *[0.1] * 6))
    # The first layer from there on that may drop: layer 5 is a Mamba layer, layer 4 an MLP.
    later = retention_by_layer("M-M*-M-M*-", 0.64, "all", Step(layer=4))
    assert later == pytest.approx((*[1] * 6, *[0.1] * 4))
    constant = retention_by_layer(NANO_12B, 0.25, "all", Step())
    assert len(set(constant)) == 2
    assert constant[1] == pytest.approx((0.25 * 62 - 1) / 61)
    # PyramidDrop: four stages of half the tokens of the one before.
    halves = retention_by_layer("*" * 8, (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4, "all", Stages(stages=4))
    assert halves == pytest.approx([1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8])
    # Or with an end after layers of one's choice.
    chosen = retention_by_layer("M" * 8, (1 + 1 / 2 + 5 / 4 + 1 / 8) / 8, [0, 1, 6], Stages())
    assert chosen == pytest.approx([1, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 8])


def test_layers_that_may_drop():
    pattern = "M-M*-|M-M*-"
    words = {
        "all": (0, 2, 3, 5, 7, 8),
        "attention": (3, 8),
        "mamba": (0, 2, 5, 7),
        "every_2": (0, 3, 7),
        "every_9": (0,),
    }
    assert {word: reducing_layers(pattern, word) for word in words} == words
    assert reducing_layers(pattern, [7, 0, 3]) == (0, 3, 7)


@pytest.mark.parametrize("budget", [0.15, 0.25])
def test_small_budgets_drop_earlier(budget):
    retention = retention_by_layer(NANO_12B, budget)
    assert sum(retention) / len(NANO_12B) == pytest.approx(budget, abs=1e-9)


@pytest.mark.parametrize("layers", ["all", "attention"])
def test_a_floor_that_the_budget_cannot_hold_is_lowered(layers: str):
    pattern, shape = "M*-M*-M-M*-M-M*-", Sigmoid(floor=0.1)
    tight = retention_by_layer(pattern, 0.15, layers, shape)
    assert fmean(tight) == pytest.approx(0.15)
    first = 1 + min(reducing_layers(pattern, layers))
    assert set(tight[:first]) == {1.0}
    # Everything drops at once, to one share below the floor that was asked for.
    assert tight[first:] == pytest.approx([tight[-1]] * (len(tight) - first))
    assert 0 < tight[-1] < 0.1
    assert retention_by_layer(pattern, 0.25, layers, shape)[-1] == pytest.approx(0.1, abs=0.01)


def test_published_floors_of_the_sigmoid():
    """The method's notes give these floors for the 12B pattern at a budget of 0.25."""
    for midpoint, slope, floor in ((0.2, 10, 0.006), (0.1, 8, 0.044)):
        assert retention_by_layer(NANO_12B, 0.25, "all", Sigmoid(midpoint, slope, floor=None))[-1] == pytest.approx(
            floor, abs=0.01
        )


def test_only_layers_that_score_drop():
    retention = retention_by_layer("M-M*-M-", 0.7, "attention")
    assert retention[:4] == (1.0,) * 4
    assert retention[4] == retention[5] == retention[6] < 1.0
    explicit = retention_by_layer("M-M*-M-", 0.6, [2])
    assert explicit[:3] == (1.0,) * 3
    assert explicit[3] < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("M-M*", 1.5), "reduction.budget=1.5: must be above 0 and at most 1"),
        (("M-M*", 0.5, [9]), "layer 9: the pattern has layers 0 to 3"),
        (("M-M*", 0.5, [1]), r"layer 1, a '-': only M and \* compute scores"),
        (("M-M*", 0.5, "mlp"), "allowed are all, attention, mamba"),
        (("M-M*", 0.1), "still keeps a mean of 0.250"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        retention_by_layer(*arguments)


def test_budget_of_one_keeps_all():
    assert set(retention_by_layer(NANO_12B, 1.0)) == {1.0}


def longest_stretch(retention: tuple[float, ...]) -> int:
    return max(len(list(run)) for share, run in groupby(retention) if share < 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_meet_the_budget(pattern, shape):
    """The sum over layers is below the budget's by less than the longest stretch, and above by the minimum only."""
    for layers, budget in itertools.product(LAYERS, (0.15, 0.25, 0.6)):
        retention = solved(pattern, budget, layers, shape)
        if retention is None:
            continue
        for num_visual in (0, 1, 7, 256, 8191):
            counts = kept_counts(retention, num_visual)
            wanted = [max(share * num_visual, min(1, num_visual)) for share in retention]
            assert counts[0] == num_visual
            assert all(later <= earlier for earlier, later in pairwise(counts))
            assert min(counts) >= min(1, num_visual)
            missing = sum(wanted) - sum(counts)
            assert -1e-6 <= missing < longest_stretch(retention)
            if retention[-1] * num_visual >= 1:
                assert sum(counts) == pytest.approx(budget * num_visual * len(pattern), abs=longest_stretch(retention))
            # A layer that cannot drop passes on what it got.
            reducing = reducing_layers(pattern, layers)
            assert all(counts[i] == counts[i - 1] for i in range(1, len(pattern)) if i - 1 not in reducing)


def test_the_demo_has_the_plans_it_was_measured_with():
    pattern, first = "M-M*-M-M*-", Sigmoid(floor=None)
    assert kept_counts(retention_by_layer(pattern, 0.25, "all", first), 256) == (256, 178, 178, 19, 4, 4, 1, 1, 1, 1)
    assert kept_counts(retention_by_layer(pattern, 0.25), 256) == (256, 58, 58, 39, *[38] * 6)


def test_counts_keep_a_minimum():
    assert min(kept_counts(retention_by_layer(NANO_12B, 0.25, "all", Sigmoid(floor=None)), 256, min_tokens=8)) == 8
    assert kept_counts((1.0, 0.1), 3, min_tokens=8) == (3, 3)
    assert kept_counts((1.0, 0.5), 0) == (0, 0)


@pytest.mark.parametrize("multiple_of", [2, 16, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aligned_counts_meet_the_budget(shape, multiple_of):
    numbers = random.Random(multiple_of)
    for layers, budget in itertools.product(("all", "attention"), (0.25, 0.5)):
        retention = solved(NANO_12B, budget, layers, shape)
        if retention is None:
            continue
        for samples in (1, 3):
            visual = tuple(numbers.randint(0, 4000) for _ in range(samples))
            num_text = 50 * samples + -(50 * samples + sum(visual)) % multiple_of
            by_layer = packed_counts([retention] * samples, visual, num_text, 1, multiple_of)
            assert by_layer[0] == visual
            totals = [sum(counts) for counts in by_layer]
            assert all((num_text + total) % multiple_of == 0 for total in totals)
            for counts in zip(*by_layer):
                assert all(later <= earlier for earlier, later in pairwise(counts))
                assert min(counts) >= min(1, counts[0])
            wanted = [[max(share * count, min(1, count)) for count in visual] for share in retention]
            missing = sum(map(sum, wanted)) - sum(totals)
            # What the minimum and its alignment force on the last layers may not fit into the others.
            forced = sum(max(0, samples + multiple_of - sum(layer)) for layer in wanted)
            assert -forced - 1e-6 <= missing < multiple_of * longest_stretch(retention)
            if sum(wanted[-1]) > samples + multiple_of:
                assert missing >= -1e-6
            # A sample is off by no more than its share of what the totals are off.
            off = max(abs(sum(layer) - total) for layer, total in zip(wanted, totals))
            for layer, counts in zip(wanted, by_layer):
                assert all(abs(want - count) <= off + 1 for want, count in zip(layer, counts))


def test_rounding_gives_back_what_the_minimum_takes():
    # Down, then up where most was lost; a stretch of equal layers together.
    assert rounded([10, 7.6, 7.6, 2.7, 0.3], 10, 0) == (10, 7, 7, 3, 1)
    assert rounded([10, 7.9, 7.9, 2.7, 0.5], 10, 0) == (10, 8, 8, 3, 0)
    # In steps of 16, 1 becomes 16, and an earlier layer makes room for it.
    assert rounded([64, 48, 20, 1], 64, 1, 16) == (64, 32, 16, 16)
    # As far as it can: nothing is lower than the lowest, and the first layer gets all.
    assert rounded([64, 32, 1, 1, 1, 1], 64, 1, 16) == (64, 16, 16, 16, 16, 16)
    # Remainders: counts of 5, 21, 37, 53 make the packed length divide.
    assert rounded([53, 40, 36.9, 9], 53, 1, 16, 5) == (53, 37, 37, 5)


def test_alignment_is_of_the_packed_length():
    retention = retention_by_layer(NANO_12B, 0.25)
    assert packed_counts([retention] * 2, (100, 60), 32) == list(
        zip(kept_counts(retention, 100), kept_counts(retention, 60))
    )
    with pytest.raises(ValueError, match="193 tokens does not divide by 16"):
        packed_counts([retention] * 2, (100, 60), 33, multiple_of=16)
    # Nothing fits between all and none: all stay.
    assert packed_counts([(1.0, 0.5)], (7,), 1, multiple_of=8) == [(7,), (7,)]
