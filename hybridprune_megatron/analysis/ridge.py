"""A linear probe: scikit-learn's ridge regression, scored on samples that it has not seen, beside shuffled targets.

Shape letters: n samples, D features, K targets, P sets of targets.

The strength of the ridge is chosen inside every training part by its leave-one-out error, which ridge regression has in
closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Strengths that are tried, in units of the mean squared norm of a sample.
_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 4))
FOLDS = 5
SHUFFLES = 50

#: [P, n, K] predictions and targets to P scores, higher is better.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """How well a linear map recovers something.

    Attributes:
        score: on samples that were held out, each exactly once.
        shuffled: mean score when the targets are dealt to the samples at random: what no information at all looks like.
        shuffled_high: 95th percentile of these scores; a score below it says nothing.
        predictions: float64 [n, K] after ``score``.
    """

    score: float
    shuffled: float
    shuffled_high: float
    predictions: Tensor = field(repr=False)


def probe(features: Tensor, targets: Tensor, score: Score, seed: int = 0) -> Probe:
    """Cross-validated score of a ridge probe, for the targets as they are and for shuffled ones.

    Args:
        features: [n, D].
        targets: [n, K].
        score: ``explained_variance`` or ``accuracy``.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(features)
    orders = [torch.arange(count)] + [torch.randperm(count, generator=generator) for _ in range(SHUFFLES)]
    sets = torch.stack([targets.double().cpu()[order] for order in orders])
    predictions = held_out_predictions(features.double().cpu(), sets, seed)
    scores = score(predictions, sets)
    shuffled = scores[1:]
    return Probe(scores[0].item(), shuffled.mean().item(), shuffled.quantile(0.95).item(), predictions[0])


def held_out_predictions(features: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
    """Predictions of every sample by a ridge regression that was fitted without it.

    Args:
        features: float64 [n, D].
        targets: float64 [P, n, K].

    Returns:
        float64 [P, n, K].

    Raises:
        ValueError: fewer samples than two a fold.
    """
    count = len(features)
    if count < 2 * FOLDS:
        raise ValueError(f"{count} samples to probe with: {FOLDS} folds need at least {2 * FOLDS}; raise samples")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    predictions = torch.empty_like(targets)
    for held_out in order.tensor_split(FOLDS):
        train = order[~torch.isin(order, held_out)]
        predictions[:, held_out] = _fit_and_predict(features[train], targets[:, train], features[held_out])
    return predictions


def _fit_and_predict(features: Tensor, targets: Tensor, unseen: Tensor) -> Tensor:
    """[P, m, K] predictions for unseen features [m, D]; every set of targets has a strength of its own."""
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.preprocessing import StandardScaler

    # Features by their spread in the training part; one that never changes is left out.
    scaler = StandardScaler().fit(features.numpy())
    x, (sets, count, width) = scaler.transform(features.numpy()), targets.shape
    y = targets.transpose(0, 1).flatten(1).numpy()
    unit = max(np.square(x).sum(1).mean(), np.finfo(x.dtype).tiny)
    strengths = unit * np.array(_STRENGTHS)
    left_out = RidgeCV(strengths, store_cv_results=True).fit(x, y).cv_results_
    errors = left_out.reshape(count, sets, width, -1).sum((0, 2))
    model = Ridge(strengths[errors.argmin(1)].repeat(width), solver="svd").fit(x, y)
    predicted = model.predict(scaler.transform(unseen.numpy()))
    return torch.from_numpy(predicted).unflatten(1, (sets, width)).transpose(0, 1)


def explained_variance(predictions: Tensor, targets: Tensor) -> Tensor:
    """R^2 over all targets together: 1 - squared error / squared distance from the mean. [P, n, K] twice -> [P]."""
    error = (predictions - targets).square().sum((1, 2))
    return 1 - error / (targets - targets.mean(1, keepdim=True)).square().sum((1, 2))


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose class (largest of K one-hot targets) is predicted. [P, n, K] twice -> [P]."""
    return (predictions.argmax(-1) == targets.argmax(-1)).double().mean(-1)


def principal_components(values: Tensor, count: int) -> Tensor:
    """Coordinates along the directions in which the rows differ most: [n, D] -> float64 [n, min(count, n, D)]."""
    centred = values.double() - values.double().mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    return left[:, :count] * singular[:count]


def sketch(values: Tensor, width: int) -> Tensor:
    """A vector folded to at most ``width`` numbers so that products of vectors are kept on average (count sketch).

    Every number is added to a random place with a random sign, the same for all vectors of a length. Shorter vectors
    are returned as they are.

    Args:
        values: [D].
        width: most numbers of the result.
    """
    count = len(values)
    if count <= width:
        return values
    generator = torch.Generator().manual_seed(count)
    place = torch.randint(width, (count,), generator=generator).to(values.device)
    sign = (2 * torch.randint(2, (count,), generator=generator) - 1).to(values)
    return values.new_zeros(width).index_add_(0, place, values * sign)
