"""The reduction group: its keys, their checks, and the retention per layer that follows from them.

Imports nothing slow and nothing of the training code, for the export carries this file: a folder's ``config.json`` is
checked by the same lines as a training run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from hybridprune_megatron.bounds import PositiveShare, Range, check_bounds
from hybridprune_megatron.checks import ConfigError, closest, fail
from hybridprune_megatron.config.legacy import nested
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.front import FRONTS, NoFront
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.schedule import (
    LAYER_WORDS,
    SCHEDULES,
    Listed,
    layer_symbols,
    reducing_layers,
    retention_by_layer,
)
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.method.settings import Select
from hybridprune_megatron.plugins import Registry, plain, typed

#: Keys whose value chooses a class that brings its own keys.
PARTS: dict[str, Registry[Any]] = {"score": SCORERS, "schedule": SCHEDULES, "front": FRONTS}


@dataclass
class ReductionConfig:
    """How many visual tokens are dropped, where, and by which score.

    Attributes:
        budget: mean share of visual tokens over all layers, above 0 and at most 1; 1 = no reduction.
        score: what ranks visual tokens, a name or a name with its keys; see conf/reduction.
        schedule: shape of the retention over depth, a name or a name with its keys; the budget scales it.
        layers: layers that may drop; all, attention, mamba, every_2 (every n-th of all), or a list of 0-based indices.
        select: how tokens are chosen once they are scored.
        front: query-agnostic reduction before the model, a name or a name with its keys.
        dt_filter: share of its visual tokens' steps that a Mamba head with a long memory keeps (LongMamba); null = all.
    """

    budget: Annotated[float, Range(0, 1, above=True, meaning="a share of the visual tokens", example=0.25)]
    score: Any = SCORERS.default
    schedule: Any = SCHEDULES.default
    layers: Any = "all"
    select: Select = field(default_factory=Select)
    front: Any = FRONTS.default
    dt_filter: PositiveShare | None = None

    def __post_init__(self) -> None:
        check_bounds("reduction", self)
        for name, registry in PARTS.items():
            setattr(self, name, registry.build(getattr(self, name)))
        self.schedule.check_budget(self.budget)
        self._check_front()
        self._check_pairs()
        _check_layers_type(self.layers)

    def _check_front(self) -> None:
        key, front = "reduction.front.retention", self.front
        if (type(front) is NoFront) != (front.retention == 1.0):
            raise fail(
                key,
                front.retention,
                f"reduction.front={front.name} passes on {'everything' if type(front) is NoFront else 'less than all'}",
                f"set {key}=1" if type(front) is NoFront else f"set e.g. {key}=0.5",
            )
        if self.budget < 1 and front.retention < self.budget:
            reason = f"must be at least reduction.budget={self.budget}, the mean over all layers"
            raise fail(key, front.retention, reason, f"raise {key} or lower reduction.budget")

    def _check_pairs(self) -> None:
        for name in ("smoothing_frames", "frame_share", "min_tokens_per_frame"):
            if self.score.pairs_tokens and getattr(self.select, name):
                reason = (
                    f"reduction.score={self.score.name} pairs the tokens that go with tokens that stay, which this "
                    "would undo"
                )
                fix = f"set reduction.select.{name}=0"
                raise fail(f"reduction.select.{name}", getattr(self.select, name), reason, fix)
        has_front = type(self.front) is not NoFront
        if self.select.local_choice and (not isinstance(self.score, Scorer) or has_front):
            what = f"reduction.front={self.front.name}" if has_front else f"reduction.score={self.score.name}"
            reason = f"how many tokens each rank keeps must be known before any score, and {what} moves them"
            raise fail("reduction.select.local_choice", True, reason, "set reduction.select.local_choice=false")

    def retention(self, pattern: str) -> tuple[float, ...]:
        """Share of a sample's visual tokens that enters each layer.

        Raises:
            ConfigError: layers that do not exist or cannot drop, or a budget that they cannot reach.
        """
        candidates = list(reducing_layers(pattern, "all"))
        try:
            reducing = reducing_layers(pattern, self.layers)
        except ValueError as error:
            raise ConfigError(f"{error}; set reduction.layers=all, or a list out of {candidates}") from error
        if self.budget < 1 and not reducing:
            reason = f"model.hybrid_pattern={pattern} has no such layer, so none can drop"
            fix = "set reduction.layers=all" if candidates else "set reduction=none"
            raise fail("reduction.layers", self.layers, reason, fix)
        try:
            retention = retention_by_layer(pattern, self.budget, self.layers, self.schedule, self.front.retention)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._check_formulas(pattern, retention)
        return retention

    def _check_formulas(self, pattern: str, retention: tuple[float, ...]) -> None:
        """The score has a formula for every layer that drops."""
        if not isinstance(self.score, Scorer):
            return
        for layer, symbol in enumerate(layer_symbols(pattern)[:-1]):
            if retention[layer + 1] < retention[layer] and not self.score.can_score(KINDS[symbol].name):
                reason = (
                    f"layer {layer} is to drop, and reduction.score={self.score.name} has no formula for "
                    f"{KINDS[symbol].name} layers"
                )
                fix = "name layers of another kind, e.g. reduction.layers=attention"
                raise fail("reduction.layers", self.layers, reason, fix)

    def policy(self, pattern: str, drawn: bool = False, retention: tuple[float, ...] | None = None) -> Reduction | None:
        """What a model drops.

        Args:
            drawn: samples will come with retentions of their own, so there is a reduction whatever this one says.
            retention: share that enters every layer; None: solved.

        Returns:
            None if every layer keeps everything and every step, which is bitwise the model without reduction.
        """
        retention = retention if retention is not None else self.retention(pattern)
        if min(retention) == 1.0 and not drawn and self.dt_filter is None:
            return None
        front = None if type(self.front) is NoFront else self.front
        return Reduction(self.score, retention, self.select, front, self.dt_filter)

    def plain(self) -> dict[str, Any]:
        """All keys, as ``of`` reads them back."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {name: plain(values[name]) for name in PARTS}
        values["select"] = {each.name: getattr(self.select, each.name) for each in fields(Select)}
        return values

    @staticmethod
    def of(values: Mapping[str, Any]) -> ReductionConfig:
        """From keys, of which any but the budget may be missing; flat ones of version 0.1 are read as well.

        Raises:
            ConfigError: an unknown key, or a value that a key does not take.
        """
        given = nested(values)
        listed = given.pop("retention", None)
        if listed is not None:
            given["schedule"] = {"name": Listed.name, "retention": listed}
        if "select" in given:
            given["select"] = Select(**typed(Select, given["select"], "reduction.select.", "reduction.select"))
        return ReductionConfig(**typed(ReductionConfig, given, "reduction.", "reduction"))


def _check_layers_type(layers: Any) -> None:
    """``reduction.layers`` is a known word or a list of whole numbers; which layers exist is checked with the model."""
    key, allowed = "reduction.layers", f"allowed are {LAYER_WORDS}"
    if isinstance(layers, str):
        try:
            reducing_layers("", layers)
        except ValueError as error:
            nearest = closest(layers, ("all", *(kind.name for kind in KINDS.values() if kind.scores), "every_2"))
            fix = f"did you mean {nearest}?" if nearest else "set e.g. reduction.layers=all"
            raise fail(key, layers, allowed, fix) from error
    elif not isinstance(layers, list) or not layers or any(type(index) is not int for index in layers):
        raise fail(key, layers, allowed, "set e.g. reduction.layers=[0,2]")
    elif len(set(layers)) != len(layers):
        raise fail(key, layers, "a layer is named twice", "name every layer once")
