"""Statistics of scores against their formulas written out, on odd sizes and with ties."""

from __future__ import annotations

import math

import pytest
import torch

from hybridprune_megatron.analysis.statistics import (
    auc,
    evenly_spread,
    gini,
    spearman,
    tokens_that_hold,
    top_overlap,
)


def _ranks(values: list[float]) -> list[float]:
    """For every value, 1 + how many are smaller + half of how many others are equal."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def _pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return above / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def _with_ties(rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * tokens)
    return torch.randint(-4, 5, (rows, tokens), generator=generator).float()


def test_tokens_that_hold_a_share_of_the_mass():
    # 8 of 16, 12 of 16, 14 of 16, 15 of 16, all.
    mass = torch.tensor([1.0, 8.0, 1.0, 4.0, 2.0])
    assert tokens_that_hold(mass, [0.5, 0.51, 0.75, 0.8, 0.9, 1.0]) == [0.2, 0.4, 0.4, 0.6, 0.8, 1.0]
    # Evenly spread mass: as many tokens as mass, also where the running sum rounds (0.1 has no exact double).
    assert tokens_that_hold(torch.full((1000,), 0.1), [0.5, 0.8, 0.95]) == [0.5, 0.8, 0.95]
    assert tokens_that_hold(torch.tensor([0.0, 3.0, 0.0]), [0.5, 0.95]) == [1 / 3, 1 / 3]
    assert all(math.isnan(share) for share in tokens_that_hold(torch.zeros(3), [0.5, 0.8]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 31])
def test_gini_is_half_the_mean_difference_over_the_mean(tokens):
    mass = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    differences = sum(abs(a - b) for a in mass.tolist() for b in mass.tolist())
    expected = differences / (2 * tokens**2 * mass.double().mean().item())
    assert gini(mass) == pytest.approx(expected, abs=1e-12)


def test_gini_of_the_extremes():
    assert gini(torch.full((9,), 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert gini(torch.tensor([0.0, 0.0, 5.0, 0.0])) == pytest.approx(0.75)
    assert math.isnan(gini(torch.zeros(4)))
    with pytest.raises(AssertionError, match="negative mass"):
        gini(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("tokens", [9, 64])
def test_spearman_is_the_correlation_of_ranks(tokens):
    scores = torch.cat([_with_ties(3, tokens), torch.rand(2, tokens, generator=torch.Generator().manual_seed(1))])
    found = spearman(scores)
    for i, first in enumerate(scores.tolist()):
        for j, second in enumerate(scores.tolist()):
            assert found[i, j].item() == pytest.approx(_pearson(_ranks(first), _ranks(second)), abs=1e-12)


def test_spearman_sees_order_only_and_has_none_of_equal_scores():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-9.0, 0.0, 1.0, 100.0], [4.0, 3.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    found = spearman(scores)
    assert found[0, :3].tolist() == pytest.approx([1.0, 1.0, -1.0])
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()


def test_overlap_counts_the_tokens_in_both_tops():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 5.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    # Tops of three: {0, 1, 2}, {1, 2, 4}, and {0, 1, 2} for equal scores, where earlier tokens win.
    expected = torch.tensor([[3, 2, 3], [2, 3, 2], [3, 2, 3]], dtype=torch.float64) / 3
    torch.testing.assert_close(top_overlap(scores, 3), expected)
    assert top_overlap(scores, 5).tolist() == [[1.0] * 3] * 3


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_auc_counts_pairs(tokens):
    scores = _with_ties(3, tokens)
    positive = torch.arange(tokens) % 3 == 1
    for found, row in zip(auc(scores, positive).tolist(), scores):
        wins = [
            1.0 if high > low else 0.5 if high == low else 0.0
            for high in row[positive].tolist()
            for low in row[~positive].tolist()
        ]
        assert found == pytest.approx(sum(wins) / len(wins))


def test_noise_around_zero_looks_as_the_documentation_says():
    mass = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    assert tokens_that_hold(mass, [0.5, 0.8, 0.95]) == pytest.approx([0.24, 0.50, 0.75], abs=0.005)
    assert gini(mass) == pytest.approx(0.41, abs=0.005)


def test_evenly_spread_keeps_both_ends():
    assert evenly_spread(range(10, 20), 4) == [10, 13, 16, 19]
    assert evenly_spread([3, 5, 8], 3) == [3, 5, 8]
    assert evenly_spread([3, 5, 8], 7) == [3, 5, 8]
