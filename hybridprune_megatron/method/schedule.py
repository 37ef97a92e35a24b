"""How many visual tokens enter each layer: retention per layer from a budget, kept counts from retention.

Plain python on the host, so that every shape is known before the device has computed anything and every rank, pipeline
stage and recomputation finds the same numbers.

Words: retention ``r_l`` is the share of a sample's original visual tokens that *enter* layer ``l``; the budget is the
mean of ``r_l`` over all layers. A layer that scores (Mamba ``M`` or attention ``*``) drops tokens *after* it has run,
so its decision shows in the retention of the next layer; layers that cannot score keep what they were given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, pairwise

SCORING_LAYERS = {"M": "mamba", "*": "attention"}
LAYER_WORDS = "all, attention, mamba, every_2 (every n-th of all) or a list of 0-based layer indices"
_BISECTION_STEPS = 80
_NARROWEST, _WIDEST = 1e-6, 1e6
# Sums of shares times tokens are exact up to this.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Shape:
    """How retention falls over depth; the budget decides how far.

    Attributes:
        schedule: a key of ``SCHEDULES``.
        midpoint: sigmoid: relative depth at which half is dropped, in [0, 1].
        slope: sigmoid: steepness, > 0.
        step_layer: step: drops once, after the first reducing layer from this 0-based index on.
        stages: stages: number of equally deep stages, each keeping the same share of the one before; None: a stage ends
            behind every reducing layer.
        floor: sigmoid, linear, cosine: share at the end of the curve, whose width then meets the budget; None: the
            curve spans the depth and its floor meets the budget.
    """

    schedule: str = "sigmoid"
    midpoint: float = 0.2
    slope: float = 10.0
    step_layer: int = 0
    stages: int | None = None
    floor: float | None = None


def layer_symbols(pattern: str) -> str:
    """The layers of a hybrid pattern without stage cuts: "M-M*|-M-" -> "M-M*-M-"."""
    return pattern.replace("|", "")


def even_edges(num_layers: int, stages: int) -> list[int]:
    """Where pipeline stages of about as many layers start, and the end of the last: stages + 1 layer indices."""
    return [round(stage * num_layers / stages) for stage in range(stages + 1)]


def cut_pattern(symbols: str, edges: Sequence[int]) -> str:
    """Layers with a | at every inner edge: "M-M*-M-" and [0, 4, 7] -> "M-M*|-M-"."""
    return "|".join(symbols[start:stop] for start, stop in pairwise(edges))


def reducing_layers(pattern: str, layers: str | Sequence[int]) -> tuple[int, ...]:
    """Indices (0-based) of the layers that score and drop.

    Args:
        pattern: hybrid layer pattern, e.g. "M-M*-".
        layers: "all", "attention", "mamba", "every_<n>" (every n-th of all from the first on), or explicit indices.

    Raises:
        ValueError: an unknown word, an index that is no layer, or a layer that computes nothing to score with.
    """
    symbols = layer_symbols(pattern)
    if isinstance(layers, str):
        scoring = [index for index, symbol in enumerate(symbols) if symbol in SCORING_LAYERS]
        every = re.fullmatch(r"every_([1-9]\d*)", layers)
        if every:
            return tuple(scoring[:: int(every.group(1))])
        if layers not in ("all", *SCORING_LAYERS.values()):
            raise ValueError(f"reduction.layers={layers!r}: allowed are {LAYER_WORDS}")
        return tuple(index for index in scoring if layers in ("all", SCORING_LAYERS[symbols[index]]))
    for index in layers:
        if not 0 <= index < len(symbols):
            raise ValueError(f"reduction.layers names layer {index}: the pattern has layers 0 to {len(symbols) - 1}")
        if symbols[index] not in SCORING_LAYERS:
            raise ValueError(f"reduction.layers names layer {index}, a {symbols[index]!r}: only M and * compute scores")
    return tuple(sorted(set(layers)))


def _sigmoid(shape: Shape) -> Callable[[float], float]:
    """Falling sigmoid over relative depth, scaled to be 1 at 0."""

    def curve(depth: float) -> float:
        # Beyond the exponent's bound the share is 0 in any precision that matters.
        return (1 + math.exp(-shape.slope * shape.midpoint)) / (
            1 + math.exp(min(shape.slope * (depth - shape.midpoint), 700.0))
        )

    return curve


def _linear(shape: Shape) -> Callable[[float], float]:
    """A straight line from 1 at depth 0 to 0 at depth 1."""
    return lambda depth: max(0.0, 1.0 - depth)


def _cosine(shape: Shape) -> Callable[[float], float]:
    """Half a cosine wave from 1 at depth 0 to 0 at depth 1."""
    return lambda depth: (1 + math.cos(math.pi * min(depth, 1.0))) / 2


_CURVES = {"sigmoid": _sigmoid, "linear": _linear, "cosine": _cosine}
SCHEDULES = (*_CURVES, "step", "stages")


def retention_by_layer(
    pattern: str, budget: float, layers: str | Sequence[int] = "all", shape: Shape | None = None, first: float = 1.0
) -> tuple[float, ...]:
    """Retention that enters every layer, low-to-high reduction, with its mean equal to the budget.

    One number of the shape is solved for, by bisection, for the mean rises with it:

    - sigmoid, linear, cosine: ``r(x) = floor + (first - floor) curve(x / width)`` over relative depth x. The width is 1
      and the floor solved; a budget below what a floor of 0 reaches narrows the curve instead. With ``shape.floor`` the
      width is solved; a budget that cannot hold that floor lowers it, with the narrowest width.
    - step: ``first`` up to the step, then one share, which is solved.
    - stages: ``first share^stage``, the share solved (PyramidDrop's lambda).

    Args:
        pattern: hybrid layer pattern.
        budget: mean retention over all layers, in (0, 1].
        layers: which layers may drop, see ``reducing_layers``.
        shape: how retention falls; None: the default sigmoid.
        first: retention of the first layer: what a reduction in front of the language model left.

    Returns:
        One share per layer, the first ``first``, never rising.

    Raises:
        ValueError: a budget outside (0, 1] or above ``first``, or one that these layers and this shape cannot reach.
    """
    shape = shape or Shape()
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"reduction.budget={budget}: must be above 0 and at most 1 (1 turns reduction off)")
    if budget > first:
        raise ValueError(f"reduction.budget={budget}: is above reduction.front_retention={first}, and nothing grows")
    num_layers = len(layer_symbols(pattern))
    reducing = set(reducing_layers(pattern, layers))
    if budget == first:
        return (first,) * num_layers

    def realize(target: Callable[[int], float]) -> tuple[float, ...]:
        retention = [first]
        for layer in range(1, num_layers):
            retention.append(target(layer) if layer - 1 in reducing else retention[-1])
        return tuple(retention)

    def mean(family: Callable[[float], Callable[[int], float]], value: float) -> float:
        return sum(realize(family(value))) / num_layers

    for family, low, high in _families(shape, num_layers, reducing, first):
        lowest = mean(family, low)
        if lowest <= budget:
            return realize(family(_bisect(partial(mean, family), budget, low, high)))
    earlier = {"step": "lower reduction.step_layer", "stages": "raise reduction.stages, or name earlier layers"}
    fix = earlier.get(shape.schedule, "name earlier layers")
    raise ValueError(
        f"reduction.budget={budget}: dropping everything as early as reduction.schedule={shape.schedule} and "
        f"reduction.layers={layers} allow still keeps a mean of {lowest:.3f}; raise the budget or {fix}"
    )


def _families(
    shape: Shape, num_layers: int, reducing: set[int], first: float
) -> list[tuple[Callable[[float], Callable[[int], float]], float, float]]:
    """What can be solved for, in the order in which it is tried: a map from a number to the share wanted by layer.

    The mean rises with the number between the two bounds that stand beside the map.
    """
    if shape.schedule == "step":
        return [(lambda share: lambda layer: first if layer <= shape.step_layer else share, 0.0, first)]
    if shape.schedule == "stages":
        if shape.stages is None:
            stage = [sum(index < layer for index in reducing) for layer in range(num_layers)]
        else:
            stage = [layer * shape.stages // num_layers for layer in range(num_layers)]
        return [(lambda share: lambda layer: first * share ** stage[layer], 0.0, 1.0)]
    curve = _CURVES[shape.schedule](shape)

    def falling(floor: float, width: float) -> Callable[[int], float]:
        return lambda layer: floor + (first - floor) * curve(layer / max(num_layers - 1, 1) / width)

    if shape.floor is not None:
        wanted = shape.floor
        # A budget that cannot hold the floor lowers it, all dropping at once: one floor serves every budget.
        return [
            (lambda width: falling(wanted, width), _NARROWEST, _WIDEST),
            (lambda floor: falling(floor, _NARROWEST), 0.0, wanted),
        ]
    # The curve alone may keep more than the budget: narrow it towards the input, in the limit to a drop of everything
    # right after the first layer that may drop.
    return [
        (lambda floor: falling(floor, 1.0), 0.0, first),
        (lambda width: falling(0.0, width), _NARROWEST, 1.0),
    ]


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The argument at which a rising function equals the target."""
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=4096)
def kept_counts(retention: tuple[float, ...], num_visual: int, min_tokens: int = 1) -> tuple[int, ...]:
    """Visual tokens of one sample that enter every layer.

    Args:
        retention: share per layer, never rising, from ``retention_by_layer``.
        num_visual: visual tokens of the sample before any reduction.
        min_tokens: smallest number kept (all, if the sample has fewer).

    Returns:
        One count per layer, never rising; see ``rounded`` for how their sum meets the budget.
    """
    lowest = min(min_tokens, num_visual)
    return rounded(_wanted(retention, num_visual, lowest), num_visual, lowest)


def packed_counts(
    retentions: Sequence[tuple[float, ...]],
    visual_counts: Sequence[int],
    num_text: int,
    min_tokens: int = 1,
    multiple_of: int = 1,
) -> list[tuple[int, ...]]:
    """Visual tokens of every sample of a packed sequence that enter every layer.

    With ``multiple_of`` 1 every sample has the counts it has alone. Otherwise the packed length divides at every depth:
    the totals are rounded as in ``rounded``, and each is shared among the samples by largest remainder.

    Args:
        retentions: share per layer for every sample.
        visual_counts: S visual tokens before any reduction.
        num_text: all other tokens of the packed sequence; they never change.
        min_tokens: smallest number kept per sample (all, if it has fewer).
        multiple_of: what the packed length must divide by.

    Returns:
        Per layer S counts; those of a sample never rise.

    Raises:
        ValueError: the packed length before any reduction does not divide.
    """
    if multiple_of == 1:
        alone = [kept_counts(*each, min_tokens) for each in zip(retentions, visual_counts)]
        return list(zip(*alone))
    highest = sum(visual_counts)
    if (num_text + highest) % multiple_of:
        raise ValueError(
            f"packed sequence of {num_text + highest} tokens does not divide by {multiple_of}: pad it when packing"
        )
    lowest = [min(min_tokens, count) for count in visual_counts]
    wanted = list(zip(*(_wanted(*each) for each in zip(retentions, visual_counts, lowest))))
    totals = rounded([sum(layer) for layer in wanted], highest, sum(lowest), multiple_of, -num_text % multiple_of)
    counts = [tuple(visual_counts)]
    for layer, total in zip(wanted, totals):
        counts.append(_share(total, layer, lowest, counts[-1]))
    return counts[1:]


def _wanted(retention: Sequence[float], num_visual: int, lowest: int) -> list[float]:
    """Tokens that should enter every layer, before rounding."""
    return [max(share * num_visual, lowest) for share in retention]


def _share(total: int, wanted: Sequence[float], lowest: Sequence[int], highest: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers near the wanted ones, within bounds, that sum to the total: largest remainder, earlier on ties."""
    counts = [max(low, min(high, math.floor(want))) for want, low, high in zip(wanted, lowest, highest)]
    samples = range(len(counts))
    missing = total - sum(counts)
    for _ in range(missing):
        sample = max((s for s in samples if counts[s] < highest[s]), key=lambda s: wanted[s] - counts[s])
        counts[sample] += 1
    for _ in range(-missing):
        sample = min((s for s in samples if counts[s] > lowest[s]), key=lambda s: wanted[s] - counts[s])
        counts[sample] -= 1
    return tuple(counts)


def rounded(
    wanted: Sequence[float], highest: int, lowest: int, multiple_of: int = 1, remainder: int = 0
) -> tuple[int, ...]:
    """Whole numbers near falling ones, also falling, whose sum comes near to theirs from below.

    All are rounded down; then those that lost most go up again, layers that want the same together, as long as the sum
    does not exceed the wanted one. So it stays below by less than ``multiple_of`` times the longest stretch of layers
    that want the same, and exceeds it only by what ``lowest`` adds: where rounding up to ``lowest`` takes more than its
    share, the other layers give it back as far as they can.

    Args:
        wanted: one number a layer, never rising, from ``lowest`` to ``highest``. Layers that want ``highest`` get it:
            nothing is dropped in front of them.
        highest: upper bound, of the right remainder itself.
        lowest: lower bound.
        multiple_of: the results leave ``remainder`` when divided by it.
        remainder: see there.
    """
    stretches = [(value, len(list(run))) for value, run in groupby(wanted)]
    free = [index for index, (value, _) in enumerate(stretches) if value != highest]
    least = lowest + (remainder - lowest) % multiple_of
    counts = [
        max(least, remainder + math.floor((value - remainder) / multiple_of) * multiple_of) for value, _ in stretches
    ]
    spare = _ROUNDING + sum(length * (value - count) for (value, length), count in zip(stretches, counts))

    def lost(index: int) -> float:
        return stretches[index][0] - counts[index]

    def may_fall(index: int) -> bool:
        return counts[index] - multiple_of >= (counts[index + 1] if index + 1 < len(counts) else least)

    def may_rise(index: int) -> bool:
        fits = stretches[index][1] * multiple_of <= spare
        return fits and lost(index) > 0 and counts[index] + multiple_of <= (counts[index - 1] if index else highest)

    while spare < 0 and (able := [index for index in free if may_fall(index)]):
        index = min(able, key=lambda index: (lost(index), -index))
        counts[index] -= multiple_of
        spare += stretches[index][1] * multiple_of
    while able := [index for index in free if may_rise(index)]:
        index = max(able, key=lambda index: (lost(index), -index))
        counts[index] += multiple_of
        spare -= stretches[index][1] * multiple_of
    return tuple(count for count, (_, length) in zip(counts, stretches) for _ in range(length))
