"""The reduction group: its keys, their checks, and the retention per layer that follows from them.

Imports nothing slow and nothing of the training code, for the export carries this file: a folder's ``config.json`` is
checked by the same lines as a training run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from hybridprune_megatron.config.bounds import (
    Count,
    OneOf,
    Positive,
    PositiveShare,
    Range,
    Seed,
    Share,
    Size,
    Whole,
    check_bounds,
)
from hybridprune_megatron.config.checks import ConfigError, closest, fail
from hybridprune_megatron.method.schedule import (
    LAYER_WORDS,
    SCHEDULES,
    Shape,
    layer_symbols,
    reducing_layers,
    retention_by_layer,
)

# How far the mean of an explicit reduction.retention may lie from reduction.budget.
BUDGET_TOLERANCE = 0.005


@dataclass
class ReductionConfig:
    """How many visual tokens are dropped, where, and by which score.

    Attributes:
        scorer: what ranks visual tokens (see conf/reduction).
        budget: mean share of visual tokens over all layers, above 0 and at most 1; 1 = no reduction.
        schedule: shape of the retention over depth; sigmoid, linear, cosine, step, stages; the budget scales it.
        midpoint: relative depth (0 to 1) at which the sigmoid has dropped half.
        slope: steepness of the sigmoid, above 0.
        step_layer: the step drops once, after the first layer from this 0-based index on that may drop.
        stages: equally deep stages that keep the same share of the one before; null = one behind every dropping layer.
        floor: share that sigmoid, linear or cosine falls to, less if the budget cannot hold it; null = solved.
        retention: share of visual tokens that enters each layer, a number a layer, instead of the schedule; null = off.
        layers: layers that may drop; all, attention, mamba, every_2 (every n-th of all), or a list of 0-based indices.
        min_tokens: fewest visual tokens that stay per sample.
        min_tokens_per_frame: tokens that every frame keeps while the count allows; 0 = frames compete freely.
        multiple_of: what the packed length divides by after every drop, beside what parallelism and fp8 ask for.
        local_choice: each context-parallel rank drops among the tokens it holds: no row moves, another choice.
        query_rows: text rows that score; question (all its tokens) or last (its last token).
        attention_pooling: scores of an attention layer over its heads; mean or max.
        attention_causal: false lets the question score visual tokens behind it, for questions in front of the video.
        mamba_decay: keeps the decay of the Mamba state in the score, which favours frames close to the question.
        mamba_dt: keeps the step size dt of a visual token in the Mamba score.
        mamba_function: applied to implicit attention before it is averaged; identity, abs, relu or softmax.
        mamba_pooling: scores of a Mamba layer over its heads; mean, max_groups (mean within a group) or max_heads.
        smoothing_frames: frames on either side whose same patch a score is averaged with; 0 = off.
        frame_share: share (0 to 1) of the highest score in its frame that every score gains; 0 = off.
        seed: changes the draw of the random scorer.
        dropped: what becomes of a dropped token; discard, or merge (averaged into its most similar kept one).
        front: query-agnostic reduction in front of the model; none, random, uniform, evs, evs_pixels or tome.
        front_retention: share of visual tokens that the front hands on; the budget stays the total over all layers.
        dt_filter: share of its visual tokens' steps that a Mamba head with a long memory keeps (LongMamba); null = all.
    """

    scorer: str
    budget: Annotated[float, Range(0, 1, above=True, meaning="a share of the visual tokens", example=0.25)]
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "sigmoid"
    midpoint: Share = 0.2
    slope: Positive = 10.0
    step_layer: Whole = 0
    stages: Annotated[int, Range(2, 2**20)] | None = None
    floor: Share | None = None
    retention: list[Share] | None = None
    layers: Any = "all"
    min_tokens: Count = 1
    min_tokens_per_frame: Whole = 0
    multiple_of: Size = 1
    local_choice: bool = False
    query_rows: Annotated[str, OneOf("question", "last")] = "question"
    attention_pooling: Annotated[str, OneOf("mean", "max")] = "mean"
    attention_causal: bool = True
    mamba_decay: bool = False
    mamba_dt: bool = True
    mamba_function: Annotated[str, OneOf("identity", "abs", "relu", "softmax")] = "identity"
    mamba_pooling: Annotated[str, OneOf("mean", "max_groups", "max_heads")] = "mean"
    smoothing_frames: Whole = 0
    frame_share: Share = 0.0
    seed: Seed = 0
    dropped: Annotated[str, OneOf("discard", "merge")] = "discard"
    front: Annotated[str, OneOf("none", "random", "uniform", "evs", "evs_pixels", "tome")] = "none"
    front_retention: PositiveShare = 1.0
    dt_filter: PositiveShare | None = None

    def __post_init__(self) -> None:
        check_bounds("reduction", self)
        self._check_floor()
        self._check_front()
        self._check_pairs()
        _check_layers_type(self.layers)

    def _check_floor(self) -> None:
        if self.floor is None:
            return
        if self.schedule in ("step", "stages"):
            raise fail(
                "reduction.floor",
                self.floor,
                f"the budget alone decides what reduction.schedule={self.schedule} falls to",
                "set reduction.floor=null, or take schedule sigmoid, linear or cosine",
            )
        if self.floor >= self.budget:
            raise fail(
                "reduction.floor",
                self.floor,
                f"must lie below reduction.budget={self.budget}, the mean over all layers",
                "lower reduction.floor",
            )

    def _check_front(self) -> None:
        key = "reduction.front_retention"
        if (self.front == "none") != (self.front_retention == 1.0):
            raise fail(
                key,
                self.front_retention,
                f"reduction.front={self.front} hands on {'everything' if self.front == 'none' else 'a share below 1'}",
                f"set {key}=1" if self.front == "none" else f"set e.g. {key}=0.5",
            )
        if self.budget < 1 and self.front_retention < self.budget:
            raise fail(
                key,
                self.front_retention,
                f"must be at least reduction.budget={self.budget}, the mean over all layers",
                f"raise {key} or lower reduction.budget",
            )

    def _check_pairs(self) -> None:
        for name in ("smoothing_frames", "frame_share", "min_tokens_per_frame"):
            if self.scorer == "utrc" and getattr(self, name):
                raise fail(
                    f"reduction.{name}",
                    getattr(self, name),
                    "reduction.scorer=utrc pairs the tokens that go with tokens that stay, which this would undo",
                    f"set reduction.{name}=0",
                )
        if self.local_choice and (self.scorer == "utrc" or self.front != "none"):
            what = "reduction.scorer=utrc" if self.scorer == "utrc" else f"reduction.front={self.front}"
            raise fail(
                "reduction.local_choice",
                True,
                f"how many tokens each rank keeps must be known before any score, and {what} moves them",
                "set reduction.local_choice=false",
            )


def _check_layers_type(layers: Any) -> None:
    """``reduction.layers`` is a known word or a list of whole numbers; which layers exist is checked with the model."""
    key, allowed = "reduction.layers", f"allowed are {LAYER_WORDS}"
    if isinstance(layers, str):
        try:
            reducing_layers("", layers)
        except ValueError as error:
            nearest = closest(layers, ("all", "attention", "mamba", "every_2"))
            fix = f"did you mean {nearest}?" if nearest else "set e.g. reduction.layers=all"
            raise fail(key, layers, allowed, fix) from error
    elif not isinstance(layers, list) or not layers or any(type(index) is not int for index in layers):
        raise fail(key, layers, allowed, "set e.g. reduction.layers=[0,2]")
    elif len(set(layers)) != len(layers):
        raise fail(key, layers, "a layer is named twice", "name every layer once")


def resolved_retention(reduction: ReductionConfig, pattern: str) -> tuple[float, ...]:
    """Share of a sample's visual tokens that enters each layer: ``reduction.retention``, or the solved schedule.

    Args:
        reduction: the settings.
        pattern: hybrid layer pattern.

    Raises:
        ConfigError: layers that do not exist or cannot drop, a budget that they cannot reach, or an explicit list that
            is no schedule.
    """
    candidates = list(reducing_layers(pattern, "all"))
    try:
        reducing = set(reducing_layers(pattern, reduction.layers))
    except ValueError as error:
        raise ConfigError(f"{error}; set reduction.layers=all, or a list out of {candidates}") from error
    if reduction.budget < 1 and not reducing:
        raise fail(
            "reduction.layers",
            reduction.layers,
            f"model.hybrid_pattern={pattern} has no such layer, so none can drop",
            "set reduction.layers=all" if candidates else "set reduction=none",
        )
    if reduction.retention is not None:
        _check_explicit_retention(reduction, reduction.retention, pattern, reducing)
        return tuple(reduction.retention)
    try:
        shape = Shape(**{field.name: getattr(reduction, field.name) for field in fields(Shape)})
        return retention_by_layer(pattern, reduction.budget, reduction.layers, shape, reduction.front_retention)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_explicit_retention(
    reduction: ReductionConfig, retention: list[float], pattern: str, reducing: set[int]
) -> None:
    """A list of shares is a schedule: one a layer, from the front's down, dropping only behind layers that may drop."""
    key, symbols = "reduction.retention", layer_symbols(pattern)
    if len(retention) != len(symbols):
        raise fail(
            key, f"{len(retention)} numbers", f"model.hybrid_pattern has {len(symbols)} layers", "give one a layer"
        )
    first = reduction.front_retention
    if retention[0] != first:
        reason = "every visual token enters the first layer" if first == 1 else f"reduction.front_retention={first}"
        raise fail(f"{key}[0]", retention[0], reason, f"set {key}=[{first},...]")
    for layer in range(1, len(symbols)):
        before, now = retention[layer - 1], retention[layer]
        if now > before:
            raise fail(
                f"{key}[{layer}]",
                now,
                f"rises from {before} of layer {layer - 1}, and dropped tokens do not come back",
                f"use at most {before} from layer {layer} on",
            )
        if now < before and layer - 1 not in reducing:
            raise fail(
                f"{key}[{layer}]",
                now,
                f"falls from {before}, but the layer in front, {layer - 1} ({symbols[layer - 1]!r}), may not drop",
                "let it fall only behind an M or * layer that reduction.layers names",
            )
    mean = sum(retention) / len(symbols)
    if abs(mean - reduction.budget) > BUDGET_TOLERANCE:
        raise fail(
            f"{key} (its mean)",
            f"{mean:.3f}",
            f"differs from reduction.budget={reduction.budget}",
            f"set reduction.budget={mean:.3f}, the mean of the list",
        )
