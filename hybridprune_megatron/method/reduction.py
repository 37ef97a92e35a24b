"""What a model drops, and how many visual tokens each layer hands on: the same in training and in the export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.method.front import Front, build_front
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.local_choice import LocalChoice
from hybridprune_megatron.method.merge import Ranking, take_merged
from hybridprune_megatron.method.plan import Plan, select
from hybridprune_megatron.method.schedule import packed_counts
from hybridprune_megatron.method.scorers import OUTPUT_SCORERS, OutputScorer, Scorer, build_scorer
from hybridprune_megatron.method.smoothing import smoothed, with_frame


@dataclass(frozen=True)
class Reduction:
    """What to drop where; the same in every forward pass of a model.

    Attributes:
        scorer: scores the visual tokens by what a mixer computes; None: ``output_scorer`` ranks them.
        retention: share of the original visual tokens that enters every layer of the whole model. The first one is
            below 1 where something drops tokens in front of the language model.
        min_tokens: smallest number of visual tokens a sample keeps.
        min_tokens_per_frame: tokens that every frame keeps while the sample's count allows.
        smoothing_frames: frames on either side whose same patch a score is averaged with.
        frame_share: share of the highest score in its frame that every score gains.
        multiple_of: what the packed length must divide by after every drop.
        dropped: what becomes of a dropped token: "discard", or "merge" into the kept token most like it.
        front: drops or merges tokens in front of the language model; None: all enter it.
        dt_filter: share of its visual tokens' steps that a Mamba head with a long memory keeps; None: no filter.
        output_scorer: ranks the visual tokens by the output of a layer; None: ``scorer`` does.
        by_sample: a retention of its own for every sample of the one pass this is for; None: ``retention`` for all.
        local_choice: whether context-parallel ranks drop among the tokens that they hold.
        local: how many, for the one packed sequence this is for; None: the choice is global.
    """

    scorer: Scorer | None
    retention: tuple[float, ...]
    min_tokens: int = 1
    min_tokens_per_frame: int = 0
    smoothing_frames: int = 0
    frame_share: float = 0.0
    multiple_of: int = 1
    dropped: str = "discard"
    front: Front | None = None
    dt_filter: float | None = None
    output_scorer: OutputScorer | None = None
    by_sample: tuple[tuple[float, ...], ...] | None = None
    local_choice: bool = False
    local: LocalChoice | None = None

    @staticmethod
    def of(settings: Mapping[str, Any], retention: Sequence[float], by_sample: bool = False) -> Reduction | None:
        """The reduction of a configuration.

        Args:
            settings: the keys of the reduction group (``config/reduction_schema.py``); a key that is missing has this
                class's default, one that belongs to the schedule is not read.
            retention: share that enters every layer, solved from the same settings.
            by_sample: samples will come with retentions of their own, so there is a reduction whatever this one says.

        Returns:
            None if every layer keeps everything and every step, which is bitwise the model without reduction.

        Raises:
            ValueError: an unknown scorer or front.
        """
        if min(retention) == 1.0 and not by_sample and settings.get("dt_filter") is None:
            return None
        own = {field.name for field in fields(Reduction)} - {"scorer", "retention", "front"}
        chosen = {name: value for name, value in settings.items() if name in own} | {"front": build_front(settings)}
        scorer = build_scorer(settings)
        if settings["scorer"] in OUTPUT_SCORERS:
            return Reduction(None, tuple(retention), output_scorer=scorer, **chosen)
        return Reduction(scorer, tuple(retention), **chosen)

    def counts_by_layer(self, layout: TokenLayout, multiple_of: int = 1) -> list[tuple[int, ...]]:
        """Per layer, the visual tokens of each sample of a packed sequence that enter it.

        Args:
            layout: the packed sequence; what was dropped from it before does not matter.
            multiple_of: what the packed length must divide by in every layer, beside the reduction's own setting.

        Raises:
            ValueError: the packed length before any reduction does not divide either.
        """
        if self.local is not None:
            return self.local.counts_by_layer()
        visual_counts = layout.original_visual_counts
        retentions = self.by_sample if self.by_sample is not None else (self.retention,) * len(visual_counts)
        if self.front is not None:
            fewest = self.front.fewest(layout)
            retentions = tuple(_at_least(*each) for each in zip(retentions, fewest, visual_counts, strict=True))
        return packed_counts(
            retentions,
            visual_counts,
            layout.num_tokens - sum(layout.visual_counts),
            self.min_tokens,
            math.lcm(multiple_of, self.multiple_of),
        )

    def in_front(
        self, hidden: Tensor, layout: TokenLayout, pixels: Tensor | None, multiple_of: int = 1
    ) -> tuple[Tensor, TokenLayout]:
        """What enters layer 0: everything, or what the front hands on.

        Args:
            hidden: [L, ...] embeddings before any reduction, all tokens and channels.
            layout: the packed sequence before any reduction.
            pixels: [F, 3, height, width] the frames in the order of the layout; None: there are only features of them.
            multiple_of: as for ``counts_by_layer``.

        Returns:
            [L', ...], and the layout of what is left.
        """
        if self.front is None or not sum(layout.visual_counts):
            return hidden, layout
        counts = self.counts_by_layer(layout, multiple_of)[0]
        with torch.no_grad():
            features = hidden.index_select(0, layout.visual_index).flatten(1)
            ranking = self.front.rank(features, pixels, layout, counts)
            plan = select(ranking.scores, layout, counts)
        if ranking.partner is not None:
            return take_merged(hidden, layout, plan, ranking.partner), plan.layout
        return plan.take(hidden), plan.layout

    def drop(
        self, hidden: Tensor, layout: TokenLayout, counts: Sequence[int], scores: Tensor | None
    ) -> tuple[Tensor, TokenLayout]:
        """The step behind a layer that drops: from scores to the tokens that are left.

        Args:
            hidden: [L, ...] behind the layer, all tokens and channels.
            layout: the packed sequence that left the layer.
            counts: S numbers of visual tokens that stay (host).
            scores: float32 [V] of the layer's mixer over all heads; None where ``output_scorer`` ranks.

        Returns:
            [L', ...], and the layout of what is left.
        """
        with torch.no_grad():
            if self.output_scorer is not None:
                ranking = self.output_scorer.output(hidden.flatten(1), layout, counts)
            else:
                assert scores is not None, "a layer was asked to score and did not"
                ranking = Ranking(scores)
            plan = self.plan(ranking.scores, layout, counts)
        if self.dropped == "merge":
            return take_merged(hidden, layout, plan, ranking.partner), plan.layout
        return plan.take(hidden), plan.layout

    @property
    def looks_at_rows(self) -> bool:
        """Whether what is dropped, or what becomes of it, depends on hidden states behind the layer."""
        return self.output_scorer is not None or self.dropped == "merge"

    @torch.no_grad()
    def plan(self, scores: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Plan:
        """Which tokens stay; arguments as for ``drop``."""
        scores = with_frame(smoothed(scores, layout, self.smoothing_frames), layout, self.frame_share)
        runs = self.local.runs(layout.visual_counts, counts) if self.local is not None else None
        return select(scores, layout, counts, self.min_tokens_per_frame, runs)


def _at_least(retention: tuple[float, ...], fewest: int, num_visual: int) -> tuple[float, ...]:
    """A retention under which a front hands on so many tokens; what is dropped inside stays."""
    least = fewest / max(num_visual, 1)
    return tuple(max(share, least) if share == retention[0] else share for share in retention)


def counts_after(layer: int, layout: TokenLayout, counts: Sequence[tuple[int, ...]] | None) -> tuple[int, ...]:
    """Visual tokens per sample that leave a layer; equal to ``layout.visual_counts`` where it drops nothing.

    Args:
        layer: 0-based index in the whole model.
        layout: the tokens that enter it.
        counts: from ``Reduction.counts_by_layer``; None: no reduction.
    """
    if counts is None or layer + 1 >= len(counts):
        return layout.visual_counts
    return counts[layer + 1]
