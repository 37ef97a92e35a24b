"""Statistics of scores: how concentrated they are in one layer, how alike two layers rank.

Shape letters: V visual tokens of one sample, R score vectors (one per layer). Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Running sums of equal values reach a share only up to rounding.
_ROUNDING = 1e-12


def tokens_that_hold(mass: Tensor, shares: Sequence[float]) -> list[float]:
    """Smallest share of tokens that together hold a share of the mass, for several shares.

    Args:
        mass: [V], at least 0.
        shares: of the mass, each above 0 and at most 1.

    Returns:
        One share of tokens in (0, 1] each; ``nan`` if there is no mass. Evenly spread mass gives the shares themselves
        (rounded up to whole tokens).
    """
    _check_mass(mass)
    held = mass.double().sort(descending=True).values.cumsum(0)
    total = held[-1].item()
    if total == 0:
        return [float("nan")] * len(shares)
    wanted = held.new_tensor([share * total * (1 - _ROUNDING) for share in shares])
    return [(index + 1) / len(mass) for index in torch.searchsorted(held, wanted).tolist()]


def gini(mass: Tensor) -> float:
    """Gini coefficient: 0 where all tokens have the same mass, 1 - 1/V where one token has all of it.

    ``G = 2 sum_i i x_(i) / (V sum_i x_i) - (V + 1) / V`` over the mass in rising order, i from 1.

    Args:
        mass: [V], at least 0.

    Returns:
        ``nan`` if there is no mass.
    """
    _check_mass(mass)
    rising = mass.double().sort().values
    count, total = len(mass), rising.sum().item()
    if total == 0:
        return float("nan")
    index = torch.arange(1, count + 1, dtype=torch.float64, device=mass.device)
    return 2 * (index * rising).sum().item() / (count * total) - (count + 1) / count


def spearman(scores: Tensor) -> Tensor:
    """Spearman's rank correlation of every pair of score vectors, ties by average ranks.

    Args:
        scores: [R, V].

    Returns:
        float64 [R, R] in [-1, 1]; ``nan`` in the rows and columns of a vector whose scores are all equal.
    """
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.double().cpu(), axis=-1))
    # Ranks are multiples of 1/2, so the spread of equal scores is exactly 0, and 0 / 0 is the nan that is promised.
    return torch.corrcoef(ranks)


def top_overlap(scores: Tensor, count: int) -> Tensor:
    """Share of the ``count`` highest tokens that two score vectors have in common; by chance ``count`` / V.

    Ties keep the earlier token, as ``method.plan.select`` does.

    Args:
        scores: [R, V].
        count: size of the top, 1 to V.

    Returns:
        float64 [R, R] in [0, 1].
    """
    assert 1 <= count <= scores.shape[-1], (count, scores.shape)
    top = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]
    member = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device).scatter_(1, top, 1.0)
    return member @ member.T / count


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Probability that a positive token scores above another one (area under the ROC curve), ties count half.

    Args:
        scores: [R, V].
        positive: bool [V], neither all nor none.

    Returns:
        float64 [R]; 0.5 for scores that know nothing.
    """
    from sklearn.metrics import roc_auc_score

    count = int(positive.sum())
    assert 0 < count < len(positive), f"{count} of {len(positive)} tokens are positive"
    return torch.tensor([roc_auc_score(positive.cpu(), row) for row in scores.cpu()], dtype=torch.float64)


def evenly_spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, the first and the last among them, in their order."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _check_mass(mass: Tensor) -> None:
    assert mass.dim() == 1, mass.shape
    assert len(mass) > 0, "mass of no token"
    assert (mass >= 0).all(), f"negative mass: {mass.min().item()}"
