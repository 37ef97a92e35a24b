"""Retention meets the budget, counts meet the retention, alignment keeps more real tokens."""

from itertools import pairwise

import pytest

from hybridprune_megatron.method.schedule import Shape, kept_counts, packed_counts, reducing_layers, retention_by_layer

NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
PATTERNS = [NANO_12B, "M-M-M-M*-M-M-M-M*-M-M-", "M-M*-M-M*-", "M*M*"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("layers", ["all", "attention", "mamba"])
def test_mean_retention_is_the_budget(pattern, budget, layers):
    first = reducing_layers(pattern, layers)[0] + 1
    if budget < first / len(pattern):
        with pytest.raises(ValueError, match="name earlier layers"):
            retention_by_layer(pattern, budget, layers)
        return
    retention = retention_by_layer(pattern, budget, layers)
    assert sum(retention) / len(pattern) == pytest.approx(budget, abs=1e-9)
    assert retention[0] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(retention))


@pytest.mark.parametrize("budget", [0.15, 0.25])
def test_small_budgets_drop_earlier(budget):
    retention = retention_by_layer(NANO_12B, budget)
    assert sum(retention) / len(NANO_12B) == pytest.approx(budget, abs=1e-9)


def test_published_floors_of_the_sigmoid():
    """The method's notes give these floors for the 12B pattern at a budget of 0.25."""
    for midpoint, slope, floor in ((0.2, 10, 0.006), (0.1, 8, 0.044)):
        assert retention_by_layer(NANO_12B, 0.25, "all", Shape(midpoint=midpoint, slope=slope))[-1] == pytest.approx(
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


@pytest.mark.parametrize("num_visual", [1, 2, 16, 255, 256, 8191])
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_counts_stay_on_the_budget(num_visual, budget):
    counts = kept_counts(retention_by_layer(NANO_12B, budget), num_visual)
    assert counts[0] == num_visual
    assert all(later <= earlier for earlier, later in pairwise(counts))
    assert counts[-1] >= 1
    if num_visual >= 256:
        assert sum(counts) / len(counts) / num_visual == pytest.approx(budget, abs=0.005)


def test_counts_keep_a_minimum():
    assert min(kept_counts(retention_by_layer(NANO_12B, 0.25), 256, min_tokens=8)) == 8
    assert kept_counts((1.0, 0.1), 3, min_tokens=8) == (3, 3)
    assert kept_counts((1.0, 0.5), 0) == (0, 0)


def test_alignment_is_exact_in_every_layer_and_shares_among_samples():
    retention = retention_by_layer(NANO_12B, 0.25)
    counts = packed_counts([retention] * 2, (100, 60), 32, multiple_of=16)
    assert counts[0] == (100, 60)
    assert all((32 + sum(layer)) % 16 == 0 for layer in counts)
    with pytest.raises(ValueError, match="193 tokens does not divide by 16"):
        packed_counts([retention] * 2, (100, 60), 33, multiple_of=16)
