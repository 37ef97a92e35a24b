"""What a model drops, and how many visual tokens each layer hands on: the same in training and in the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.schedule import aligned_counts, kept_counts
from hybridprune_megatron.method.scorers import Scorer


@dataclass(frozen=True)
class Reduction:
    """What to drop where; the same in every forward pass of a model.

    Attributes:
        scorer: scores the visual tokens.
        retention: share of the original visual tokens that enters every layer of the whole model.
        min_tokens: smallest number of visual tokens a sample keeps.
        multiple_of: what the packed length must divide by after every drop; met by keeping more real tokens.
        by_sample: a retention of its own for every sample of the one pass this is for; None: ``retention`` for all.
    """

    scorer: Scorer
    retention: tuple[float, ...]
    min_tokens: int = 1
    multiple_of: int = 1
    by_sample: tuple[tuple[float, ...], ...] | None = None

    def wanted_counts(self, visual_counts: Sequence[int]) -> list[tuple[int, ...]]:
        """Per layer, the visual tokens of each sample that enter it, before alignment.

        Args:
            visual_counts: S visual tokens before any reduction.
        """
        retentions = self.by_sample if self.by_sample is not None else (self.retention,) * len(visual_counts)
        pairs = zip(retentions, visual_counts, strict=True)
        per_sample = [kept_counts(retention, count, self.min_tokens) for retention, count in pairs]
        return [tuple(counts[layer] for counts in per_sample) for layer in range(len(self.retention))]


def counts_after(
    layer: int, layout: TokenLayout, wanted: Sequence[tuple[int, ...]] | None, multiple_of: int = 1
) -> tuple[int, ...]:
    """Visual tokens per sample that leave a layer; equal to ``layout.visual_counts`` where it drops nothing.

    Args:
        layer: 0-based index in the whole model.
        layout: the tokens that enter it.
        wanted: from ``Reduction.wanted_counts``; None: no reduction.
        multiple_of: what the packed length must divide by.
    """
    if wanted is None or layer + 1 >= len(wanted) or wanted[layer + 1] == wanted[layer]:
        return layout.visual_counts
    # Alignment may have kept more before than is wanted now, never the other way round.
    counts = tuple(min(want, have) for want, have in zip(wanted[layer + 1], layout.visual_counts))
    if counts == layout.visual_counts:
        return counts
    return aligned_counts(counts, layout.visual_counts, layout.sample_lengths, multiple_of)
