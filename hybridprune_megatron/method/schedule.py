"""How many visual tokens enter each layer: retention per layer from a budget, kept counts from retention.

Plain python on the host, so that every shape is known before the device has computed anything and every rank, pipeline
stage and recomputation finds the same numbers.

Words (docs of the method): retention ``r_l`` is the share of a sample's original visual tokens that *enter* layer
``l``; the budget is the mean of ``r_l`` over all layers. A layer that scores (Mamba ``M`` or attention ``*``) drops
tokens *after* it has run, so its decision shows in the retention of the next layer, and layers that cannot score keep
what they were given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SCORING_LAYERS = {"M": "mamba", "*": "attention"}
_BISECTION_STEPS = 80
_NARROWEST = 1e-6


def layer_symbols(pattern: str) -> str:
    """The layers of a hybrid pattern without stage cuts: "M-M*|-M-" -> "M-M*-M-"."""
    return pattern.replace("|", "")


def reducing_layers(pattern: str, layers: str | Sequence[int]) -> tuple[int, ...]:
    """Indices (0-based) of the layers that score and drop.

    Args:
        pattern: hybrid layer pattern, e.g. "M-M*-".
        layers: "all", "attention", "mamba", or explicit indices.

    Raises:
        ValueError: an index that is no layer, or a layer that computes nothing to score with.
    """
    symbols = layer_symbols(pattern)
    if isinstance(layers, str):
        if layers not in ("all", *SCORING_LAYERS.values()):
            raise ValueError(
                f"reduction.layers={layers!r}: allowed are all, attention, mamba or a list of layer indices"
            )
        return tuple(
            index
            for index, symbol in enumerate(symbols)
            if symbol in SCORING_LAYERS and layers in ("all", SCORING_LAYERS[symbol])
        )
    for index in layers:
        if not 0 <= index < len(symbols):
            raise ValueError(f"reduction.layers names layer {index}: the pattern has layers 0 to {len(symbols) - 1}")
        if symbols[index] not in SCORING_LAYERS:
            raise ValueError(f"reduction.layers names layer {index}, a {symbols[index]!r}: only M and * compute scores")
    return tuple(sorted(set(layers)))


def sigmoid_curve(midpoint: float, slope: float) -> Callable[[float], float]:
    """Falling sigmoid over relative depth x in [0, 1], scaled to be 1 at x = 0."""

    def curve(depth: float) -> float:
        # Beyond the exponent's bound the share is 0 in any precision that matters.
        return (1 + math.exp(-slope * midpoint)) / (1 + math.exp(min(slope * (depth - midpoint), 700.0)))

    return curve


def retention_by_layer(
    pattern: str,
    budget: float,
    layers: str | Sequence[int] = "all",
    midpoint: float = 0.2,
    slope: float = 10.0,
) -> tuple[float, ...]:
    """Retention that enters every layer, low-to-high reduction, with its mean equal to the budget.

    The sigmoid keeps its midpoint and meets the budget by its floor: ``r(x) = floor + (1 - floor) curve(x)``. A budget
    below what a floor of 0 reaches compresses the curve towards the input instead.

    Args:
        pattern: hybrid layer pattern.
        budget: mean retention over all layers, in (0, 1].
        layers: which layers may drop, see ``reducing_layers``.
        midpoint: relative depth at which half is dropped, in [0, 1].
        slope: steepness of the sigmoid, > 0.

    Returns:
        One share per layer, the first 1.0, never rising.

    Raises:
        ValueError: a budget outside (0, 1], or one that these layers cannot reach.
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"reduction.budget={budget}: must be above 0 and at most 1 (1 turns reduction off)")
    num_layers = len(layer_symbols(pattern))
    reducing = set(reducing_layers(pattern, layers))
    if budget == 1.0:
        return (1.0,) * num_layers

    def realize(shape: Callable[[float], float], floor: float) -> tuple[float, ...]:
        retention = [1.0]
        for layer in range(1, num_layers):
            target = floor + (1 - floor) * shape(layer / max(num_layers - 1, 1))
            retention.append(target if layer - 1 in reducing else retention[-1])
        return tuple(retention)

    def mean(shape: Callable[[float], float], floor: float) -> float:
        return sum(realize(shape, floor)) / num_layers

    shape = sigmoid_curve(midpoint, slope)
    if mean(shape, 0.0) <= budget:
        floor = _bisect(lambda value: mean(shape, value), budget, 0.0, 1.0)
        return realize(shape, floor)

    # The curve alone keeps more than the budget: compress it towards the input, in the limit to a drop of everything
    # right after the first scoring layer.
    def compressed(width: float) -> Callable[[float], float]:
        return lambda depth: shape(depth / width)

    reachable = mean(compressed(_NARROWEST), 0.0)
    if reachable > budget:
        raise ValueError(
            f"reduction.budget={budget}: dropping everything at the first of reduction.layers={layers} still keeps a "
            f"mean of {reachable:.3f}; raise the budget or name earlier layers"
        )
    width = _bisect(lambda value: mean(compressed(value), 0.0), budget, _NARROWEST, 1.0)
    return realize(compressed(width), 0.0)


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The argument at which a rising function equals the target."""
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def kept_counts(retention: Sequence[float], num_visual: int, min_tokens: int = 1) -> tuple[int, ...]:
    """Visual tokens of one sample that enter every layer.

    What rounding adds or takes at one depth is given back at the next, so that the mean over layers stays on the budget
    also for short clips. At least ``min_tokens`` (or all, if the sample has fewer) stay.

    Args:
        retention: share per layer, never rising, from ``retention_by_layer``.
        num_visual: visual tokens of the sample before any reduction.
        min_tokens: smallest number kept.

    Returns:
        One count per layer, never rising.
    """
    counts: list[int] = []
    debt = 0.0
    lowest = min(min_tokens, num_visual)
    layer = 0
    while layer < len(retention):
        stop = layer
        while stop < len(retention) and retention[stop] == retention[layer]:
            stop += 1
        run = stop - layer
        wanted = retention[layer] * num_visual
        highest = counts[-1] if counts else num_visual
        count = max(lowest, min(highest, math.floor(wanted + debt / run + 0.5)))
        debt += run * (wanted - count)
        counts.extend([count] * run)
        layer = stop
    return tuple(counts)


def aligned_counts(
    counts: Sequence[int], previous: Sequence[int], sample_lengths: Sequence[int], multiple_of: int
) -> tuple[int, ...]:
    """Raises the kept counts of one reduction so that the packed length divides, by keeping more real tokens.

    Args:
        counts: S wanted counts after the reduction.
        previous: S counts of visual tokens before it.
        sample_lengths: S lengths before it (all kinds of tokens).
        multiple_of: what the packed length must divide by (tensor or context parallel size, FP8 tile).

    Returns:
        S counts, each at least the wanted one and at most the previous one.

    Raises:
        ValueError: the packed length before the reduction does not divide either.
    """
    if sum(sample_lengths) % multiple_of:
        raise ValueError(
            f"packed sequence of {sum(sample_lengths)} tokens does not divide by {multiple_of}: pad it when packing"
        )
    result = list(counts)
    length = sum(sample_lengths) - sum(previous) + sum(result)
    missing = -length % multiple_of
    while missing:
        # One token at a time to the samples in turn, so that no sample carries the whole alignment. All tokens kept
        # always divides, so there is room as long as something is missing.
        for sample, count in enumerate(result):
            if missing and count < previous[sample]:
                result[sample] += 1
                missing -= 1
    return tuple(result)
