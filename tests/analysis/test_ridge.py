"""The linear probe against ridge regressions that are solved one by one, and against what it must not find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridprune_megatron.analysis import ridge
from hybridprune_megatron.analysis.ridge import (
    FOLDS,
    accuracy,
    explained_variance,
    held_out_predictions,
    principal_components,
    probe,
    sketch,
)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _solve(x: Tensor, y: Tensor, strength: float, unseen: Tensor) -> Tensor:
    """Ridge with a free intercept, over the D + 1 normal equations."""
    with_one = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = strength * torch.eye(with_one.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0
    weight = torch.linalg.solve(with_one.T @ with_one + penalty, with_one.T @ y)
    return torch.cat([unseen, torch.ones(len(unseen), 1, dtype=x.dtype)], 1) @ weight


def _fit_slowly(x: Tensor, y: Tensor, unseen: Tensor) -> Tensor:
    """The strength with the least error when each sample is left out in turn, fitted anew every time."""
    weight = 1 / x.std(0)
    centre = x.mean(0)
    x, unseen = (x - centre) * weight, (unseen - centre) * weight
    unit = x.square().sum(1).mean().item()
    errors = {}
    for strength in ridge._STRENGTHS:
        left_out = [
            _solve(x[keep], y[keep], strength * unit, x[~keep]) - y[~keep]
            for keep in (torch.arange(len(x)) != i for i in range(len(x)))
        ]
        errors[strength] = torch.cat(left_out).square().sum().item()
    return _solve(x, y, min(errors, key=errors.__getitem__) * unit, unseen)


@pytest.mark.parametrize(("count", "width"), [(23, 4), (17, 40)])
def test_predictions_are_those_of_a_regression_without_the_sample(count, width):
    features = _normal(count, width) * torch.arange(1, width + 1)
    signal = features[:, :2] @ _normal(2, 3, seed=1) + 0.5 * _normal(count, 3, seed=2) + 7
    targets = torch.stack([signal, _normal(count, 3, seed=3)])
    found = held_out_predictions(features, targets, seed=5)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    seen = []
    for held_out in order.tensor_split(FOLDS):
        train = torch.tensor([i for i in range(count) if i not in held_out])
        for number, y in enumerate(targets):
            expected = _fit_slowly(features[train], y[train], features[held_out])
            torch.testing.assert_close(found[number, held_out], expected, rtol=1e-6, atol=1e-6)
        seen += held_out.tolist()
    assert sorted(seen) == list(range(count))


def test_a_feature_that_never_changes_is_left_out():
    features, targets = _normal(20, 3), _normal(1, 20, 2, seed=1)
    constant = torch.cat([features, torch.full((20, 1), 3.0, dtype=torch.float64)], 1)
    torch.testing.assert_close(held_out_predictions(constant, targets), held_out_predictions(features, targets))


def test_what_is_there_is_found_and_what_is_not_is_not():
    there = _normal(60, 2)
    features = there @ _normal(2, 500, seed=1) + _normal(60, 500, seed=2)
    found = probe(features, there, explained_variance)
    assert found.score > 0.9
    assert found.shuffled < 0.05
    absent = probe(features, _normal(60, 2, seed=4), explained_variance)
    assert absent.score <= absent.shuffled_high
    assert absent.shuffled <= absent.shuffled_high < 0.2


def test_classes_are_found_above_their_shuffles():
    classes = torch.arange(80) % 4
    one_hot = torch.nn.functional.one_hot(classes).double()
    features = torch.cat([one_hot @ _normal(4, 8), _normal(80, 30, seed=1) * 0.1], 1)
    found = probe(features, one_hot, accuracy)
    assert found.score == 1.0
    assert 0.1 < found.shuffled < 0.4
    assert found.shuffled < found.shuffled_high < 0.5


def test_scores_are_their_formulas():
    truth = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]]).double()
    guess = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]]]).double()
    assert accuracy(guess, truth).tolist() == [0.75]
    error = 2 * (0.1**2 + 0.8**2 + 0.4**2 + 0.4**2)
    assert explained_variance(guess, truth).item() == pytest.approx(1 - error / 2.0)
    assert explained_variance(truth.mean(1, keepdim=True).expand_as(truth), truth).item() == pytest.approx(0.0)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="9 samples to probe with: 5 folds need at least 10; raise samples"):
        probe(_normal(9, 3), _normal(9, 2), explained_variance)


def test_principal_components_hold_the_most_variance():
    values = _normal(30, 2) @ _normal(2, 12, seed=1)
    coordinates = principal_components(values, 5)
    assert coordinates.shape == (30, 5)
    centred = values - values.mean(0)
    # Two directions carry everything: distances between rows are kept.
    torch.testing.assert_close(coordinates[:, :2] @ coordinates[:, :2].T, centred @ centred.T)
    assert principal_components(values, 1).square().sum() > 0.5 * centred.square().sum()
    assert principal_components(_normal(3, 12), 5).shape == (3, 3)


def test_a_sketch_keeps_products_and_is_the_same_every_time():
    values = _normal(200, 3000) + 0.5
    folded = torch.stack([sketch(row, 1500) for row in values])
    assert folded.shape == (200, 1500)
    torch.testing.assert_close(sketch(values[0], 1500), folded[0])
    products, kept = values @ values.T, folded @ folded.T
    # Products of 750 on average; folding adds noise of 3750 / sqrt(1500) = 97, and no more on average than chance.
    error = (kept - products)[~torch.eye(200, dtype=torch.bool)]
    assert abs(error.mean().item()) < 60
    assert 60 < error.std().item() < 130
    assert torch.equal(sketch(values[0], 3000), values[0])
