"""What a model drops, and how many visual tokens each layer hands on: the same in training and in the export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.schedule import packed_counts
from hybridprune_megatron.method.scorers import Scorer, build_scorer


@dataclass(frozen=True)
class Reduction:
    """What to drop where; the same in every forward pass of a model.

    Attributes:
        scorer: scores the visual tokens.
        retention: share of the original visual tokens that enters every layer of the whole model. The first one is
            below 1 where something drops tokens in front of the language model.
        min_tokens: smallest number of visual tokens a sample keeps.
        min_tokens_per_frame: tokens that every frame keeps while the sample's count allows.
        smoothing_frames: frames on either side whose same patch a score is averaged with.
        multiple_of: what the packed length must divide by after every drop.
        dropped: what becomes of a dropped token: "discard".
        front: what drops tokens in front of the language model: "none".
        dt_filter: what zeroes small Mamba steps: "none".
        by_sample: a retention of its own for every sample of the one pass this is for; None: ``retention`` for all.
    """

    scorer: Scorer
    retention: tuple[float, ...]
    min_tokens: int = 1
    min_tokens_per_frame: int = 0
    smoothing_frames: int = 0
    multiple_of: int = 1
    dropped: str = "discard"
    front: str = "none"
    dt_filter: str = "none"
    by_sample: tuple[tuple[float, ...], ...] | None = None

    @staticmethod
    def of(settings: Mapping[str, Any], retention: Sequence[float], by_sample: bool = False) -> Reduction | None:
        """The reduction of a configuration.

        Args:
            settings: the keys of the reduction group (``config/reduction_schema.py``); a key that is missing has this
                class's default, one that belongs to the schedule is not read.
            retention: share that enters every layer, solved from the same settings.
            by_sample: samples will come with retentions of their own, so there is a reduction whatever this one says.

        Returns:
            None if every layer keeps everything, which is bitwise the model without reduction.

        Raises:
            ValueError: an unknown scorer.
        """
        if min(retention) == 1.0 and not by_sample:
            return None
        own = {field.name for field in fields(Reduction)} - {"scorer", "retention"}
        chosen = {name: value for name, value in settings.items() if name in own}
        return Reduction(build_scorer(settings), tuple(retention), **chosen)

    def counts_by_layer(self, layout: TokenLayout, multiple_of: int = 1) -> list[tuple[int, ...]]:
        """Per layer, the visual tokens of each sample of a packed sequence that enter it.

        Args:
            layout: the packed sequence; what was dropped from it before does not matter.
            multiple_of: what the packed length must divide by in every layer, beside the reduction's own setting.

        Raises:
            ValueError: the packed length before any reduction does not divide either.
        """
        visual_counts = layout.original_visual_counts
        retentions = self.by_sample if self.by_sample is not None else (self.retention,) * len(visual_counts)
        return packed_counts(
            retentions,
            visual_counts,
            layout.num_tokens - sum(layout.visual_counts),
            self.min_tokens,
            math.lcm(multiple_of, self.multiple_of),
        )


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
