"""How many visual tokens each layer keeps: retention per layer from a budget.

Plain python on the host, as ``counts``.

Words: the retention ``r_l`` is the share of a sample's original visual tokens that *enter* layer ``l``; the budget is
the mean of ``r_l`` over all layers. A layer that scores (Mamba ``M`` or attention ``*``) drops tokens *after* it has
run, so its decision shows in the retention of the next layer; layers that cannot score keep what they were given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar

from hybridprune_megatron.bounds import Positive, Range, Share, Whole
from hybridprune_megatron.checks import fail
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.plugins import Plugin, Registry

KEY = "reduction.schedule"
LAYER_WORDS = "all, attention, mamba, every_2 (every n-th of all) or a list of 0-based layer indices"
# How far the mean of an explicit list may lie from the budget.
BUDGET_TOLERANCE = 0.005
_BISECTION_STEPS = 80
_NARROWEST, _WIDEST = 1e-6, 1e6


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
        layers: "all", the name of a kind of layer that scores ("attention", "mamba"), "every_<n>" (every n-th of all
            from the first on), or explicit indices.

    Raises:
        ValueError: an unknown word, an index that is not a layer, or a layer that computes nothing to score with.
    """
    symbols = layer_symbols(pattern)
    names = {kind.name: symbol for symbol, kind in KINDS.items() if kind.scores}
    if isinstance(layers, str):
        scoring = [index for index, symbol in enumerate(symbols) if symbol in names.values()]
        every = re.fullmatch(r"every_([1-9]\d*)", layers)
        if every:
            return tuple(scoring[:: int(every.group(1))])
        if layers not in ("all", *names):
            raise ValueError(f"reduction.layers={layers!r}: allowed are {LAYER_WORDS}")
        return tuple(index for index in scoring if layers == "all" or symbols[index] == names[layers])
    for index in layers:
        if not 0 <= index < len(symbols):
            raise ValueError(f"reduction.layers names layer {index}: the pattern has layers 0 to {len(symbols) - 1}")
        if symbols[index] not in names.values():
            raise ValueError(
                f"reduction.layers names layer {index}, a {symbols[index]!r}: only {' and '.join(names.values())} "
                "compute scores"
            )
    return tuple(sorted(set(layers)))


def dropping_layers(pattern: str, layers: str | Sequence[int]) -> tuple[int, ...]:
    """``reducing_layers`` but the model's last layer, after which a drop saves nothing."""
    last = len(layer_symbols(pattern)) - 1
    return tuple(layer for layer in reducing_layers(pattern, layers) if layer < last)


#: From a number to the share wanted by layer, and the two bounds between which the mean rises with the number.
Family = tuple[Callable[[float], Callable[[int], float]], float, float]


@dataclass(frozen=True)
class Schedule(Plugin):
    """How retention falls over depth; the budget decides how far.

    Attributes:
        earlier: what makes more be dropped, for the message about a budget that cannot be reached.
    """

    earlier: ClassVar[str] = "name earlier layers"

    def families(self, num_layers: int, reducing: set[int], first: float) -> list[Family]:
        """What can be solved for, in the order in which it is tried.

        Args:
            num_layers: of the model.
            reducing: layers that may drop.
            first: retention of the first layer.
        """
        raise NotImplementedError

    def check_budget(self, budget: float) -> None:
        """Refuses a budget that this schedule can never have.

        Raises:
            ConfigError: it does.
        """

    def solved(self, num_layers: int, reducing: set[int], budget: float, first: float) -> tuple[float, ...]:
        """One share per layer, the first ``first``, never rising, with its mean equal to the budget.

        One number is solved for, by bisection, for the mean rises with it.

        Raises:
            ValueError: these layers cannot reach the budget.
        """
        if budget == first:
            return (first,) * num_layers

        def realize(target: Callable[[int], float]) -> tuple[float, ...]:
            retention = [first]
            for layer in range(1, num_layers):
                retention.append(target(layer) if layer - 1 in reducing else retention[-1])
            return tuple(retention)

        def mean(family: Callable[[float], Callable[[int], float]], value: float) -> float:
            return sum(realize(family(value))) / num_layers

        for family, low, high in self.families(num_layers, reducing, first):
            lowest = mean(family, low)
            if lowest <= budget:
                return realize(family(_bisect(partial(mean, family), budget, low, high)))
        raise ValueError(
            f"reduction.budget={budget}: dropping everything as early as {KEY}={self.name} and reduction.layers allow "
            f"still keeps a mean of {lowest:.3f}; raise the budget or {self.earlier}"
        )


@dataclass(frozen=True)
class _Curve(Schedule):
    """``r(x) = floor + (first - floor) curve(x / width)`` over relative depth x.

    Without a floor the width is 1 and the floor solved; a budget below what a floor of 0 reaches narrows the curve
    instead. With a floor the width is solved; a budget that cannot hold that floor lowers it, with the narrowest width.

    Attributes:
        floor: share that it falls to, less if the budget cannot hold it; null = solved.
    """

    floor: Share | None = field(default=None, kw_only=True)

    def curve(self, depth: float) -> float:
        """From 1 at depth 0, falling."""
        raise NotImplementedError

    def check_budget(self, budget: float) -> None:
        # The default gives way to any budget; a floor that somebody asks for is meant.
        default = type(self).__dataclass_fields__["floor"].default
        if self.floor is not None and self.floor != default and self.floor >= budget:
            allowed = f"must lie below reduction.budget={budget}, the mean over all layers"
            raise fail(f"{KEY}.floor", self.floor, allowed, f"lower {KEY}.floor")

    def families(self, num_layers: int, reducing: set[int], first: float) -> list[Family]:
        def falling(floor: float, width: float) -> Callable[[int], float]:
            return lambda layer: floor + (first - floor) * self.curve(layer / max(num_layers - 1, 1) / width)

        wanted = self.floor
        if wanted is not None:
            # A budget that cannot hold the floor lowers it, all dropping at once: one floor serves every budget.
            return [
                (lambda width: falling(wanted, width), _NARROWEST, _WIDEST),
                (lambda floor: falling(floor, _NARROWEST), 0.0, wanted),
            ]
        # The curve alone may keep more than the budget: narrow it towards the input, in the limit to a drop of
        # everything right after the first layer that may drop.
        return [
            (lambda floor: falling(floor, 1.0), 0.0, first),
            (lambda width: falling(0.0, width), _NARROWEST, 1.0),
        ]


@dataclass(frozen=True)
class Sigmoid(_Curve):
    """A falling sigmoid over relative depth, scaled to be 1 at 0.

    Attributes:
        midpoint: relative depth (0 to 1) at which half is dropped.
        slope: steepness, above 0.
    """

    name: ClassVar[str] = "sigmoid"
    midpoint: Share = 0.2
    slope: Positive = 10.0
    floor: Share | None = field(default=0.15, kw_only=True)

    def curve(self, depth: float) -> float:
        # Beyond the exponent's bound the share is 0 in any precision that matters.
        return (1 + math.exp(-self.slope * self.midpoint)) / (
            1 + math.exp(min(self.slope * (depth - self.midpoint), 700.0))
        )


@dataclass(frozen=True)
class Linear(_Curve):
    """A straight line from 1 at depth 0 to 0 at depth 1."""

    name: ClassVar[str] = "linear"

    def curve(self, depth: float) -> float:
        return max(0.0, 1.0 - depth)


@dataclass(frozen=True)
class Cosine(_Curve):
    """Half a cosine wave from 1 at depth 0 to 0 at depth 1."""

    name: ClassVar[str] = "cosine"

    def curve(self, depth: float) -> float:
        return (1 + math.cos(math.pi * min(depth, 1.0))) / 2


@dataclass(frozen=True)
class Step(Schedule):
    """One drop, then one share, which is solved.

    Attributes:
        layer: drops once, after the first layer from this 0-based index on that may drop.
    """

    name: ClassVar[str] = "step"
    earlier: ClassVar[str] = f"lower {KEY}.layer"
    layer: Whole = 0

    def families(self, num_layers: int, reducing: set[int], first: float) -> list[Family]:
        return [(lambda share: lambda layer: first if layer <= self.layer else share, 0.0, first)]


@dataclass(frozen=True)
class Stages(Schedule):
    """``first share^stage``, the share solved (PyramidDrop's lambda).

    Attributes:
        stages: equally deep stages that keep the same share of the one before; null = one after every dropping layer.
    """

    name: ClassVar[str] = "stages"
    earlier: ClassVar[str] = f"raise {KEY}.stages, or name earlier layers"
    stages: Annotated[int, Range(2, 2**20)] | None = None

    def families(self, num_layers: int, reducing: set[int], first: float) -> list[Family]:
        if self.stages is None:
            stage = [sum(index < layer for index in reducing) for layer in range(num_layers)]
        else:
            stage = [layer * self.stages // num_layers for layer in range(num_layers)]
        return [(lambda share: lambda layer: first * share ** stage[layer], 0.0, 1.0)]


@dataclass(frozen=True)
class Plateau(Schedule):
    """Two early drops to one share, which is solved; late layers get less.

    The first layer that may drop goes half of the way in ratio (``sqrt(first share)``), the second the rest.

    Attributes:
        end: relative depth (0 to 1) after which layers get the tail; 1 = none does.
        tail: share of the late layers, more if the budget needs it; 0 where they read nothing.
    """

    name: ClassVar[str] = "plateau"
    end: Share = 1.0
    tail: Share = 0.15

    def families(self, num_layers: int, reducing: set[int], first: float) -> list[Family]:
        once, *later = [*sorted(reducing), num_layers]
        twice = later[0] if later else num_layers

        def falling(share: float, tail: float) -> Callable[[int], float]:
            def target(layer: int) -> float:
                if layer <= once:
                    return first
                if layer <= twice:
                    return math.sqrt(first * share)
                return min(share, tail) if layer > self.end * (num_layers - 1) else share

            return target

        # A budget above what the tail allows raises the tail.
        tail = min(self.tail, first)
        return [(lambda late: falling(first, late), tail, first), (lambda share: falling(share, tail), 0.0, first)]


@dataclass(frozen=True)
class Listed(Schedule):
    """Explicit shares.

    Attributes:
        retention: share of visual tokens that enters each layer, one number per layer; its mean is the budget.
    """

    name: ClassVar[str] = "listed"
    retention: tuple[Share, ...] = ()

    def solved(self, num_layers: int, reducing: set[int], budget: float, first: float) -> tuple[float, ...]:
        """The list.

        Raises:
            ConfigError: it is not a schedule: one share per layer, from the first one down, dropping only after layers
                that may drop, with the budget as its mean.
        """
        key = f"{KEY}.retention"
        if len(self.retention) != num_layers:
            numbers = f"{len(self.retention)} numbers"
            raise fail(key, numbers, f"model.hybrid_pattern has {num_layers} layers", "give one number per layer")
        if self.retention[0] != first:
            reason = "every visual token enters the first layer" if first == 1 else f"reduction.front.retention={first}"
            raise fail(f"{key}[0]", self.retention[0], reason, f"set {key}=[{first},...]")
        for layer in range(1, num_layers):
            before, now = self.retention[layer - 1], self.retention[layer]
            if now > before:
                allowed = f"rises from {before} of layer {layer - 1}, and dropped tokens do not come back"
                raise fail(f"{key}[{layer}]", now, allowed, f"use at most {before} from layer {layer} on")
            if now < before and layer - 1 not in reducing:
                allowed = f"falls from {before}, but the layer before, {layer - 1}, may not drop"
                fix = "let it fall only after a layer that scores and that reduction.layers names"
                raise fail(f"{key}[{layer}]", now, allowed, fix)
        mean = sum(self.retention) / num_layers
        if abs(mean - budget) > BUDGET_TOLERANCE:
            allowed = f"differs from reduction.budget={budget}"
            raise fail(f"{key} (its mean)", f"{mean:.3f}", allowed, f"set reduction.budget={mean:.3f}, the list's mean")
        return self.retention


SCHEDULES = Registry(KEY, Schedule, (Sigmoid, Linear, Cosine, Step, Stages, Plateau, Listed))


def retention_by_layer(
    pattern: str,
    budget: float,
    layers: str | Sequence[int] = "all",
    schedule: Schedule | None = None,
    first: float = 1.0,
) -> tuple[float, ...]:
    """Retention that enters every layer, its mean equal to the budget.

    Args:
        pattern: hybrid layer pattern.
        budget: mean retention over all layers, in (0, 1].
        layers: which layers may drop, see ``reducing_layers``.
        schedule: how retention falls; None: the default sigmoid.
        first: retention of the first layer: what a reduction before the language model left.

    Returns:
        One share per layer, the first ``first``, never rising.

    Raises:
        ValueError: a budget outside (0, 1] or above ``first``, or one that these layers and this schedule cannot reach.
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"reduction.budget={budget}: must be above 0 and at most 1 (1 turns reduction off)")
    if budget > first:
        raise ValueError(
            f"reduction.budget={budget}: is above reduction.front.retention={first}, and dropped tokens "
            "do not come back"
        )
    num_layers, reducing = len(layer_symbols(pattern)), set(reducing_layers(pattern, layers))
    return (schedule or Sigmoid()).solved(num_layers, reducing, budget, first)


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The argument at which a rising function equals the target."""
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
