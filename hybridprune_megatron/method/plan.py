"""One reduction: which tokens of a packed sequence stay. Decided once, applied to everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout, cumulative_lengths


@dataclass(frozen=True)
class Plan:
    """The sorted indices that survive one reduction, and the layout they make.

    Attributes:
        kept: int64 [L'], rising, indices into the packed sequence before the reduction.
        layout: the packed sequence after it.
    """

    kept: Tensor
    layout: TokenLayout

    def take(self, values: Tensor, dim: int = 0) -> Tensor:
        """Rows of ``values`` (length L along ``dim``) that stay, in order; differentiable."""
        return values.index_select(dim, self.kept)


def select(scores: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Plan:
    """Keeps the highest-scored visual tokens of every sample and all other tokens, in their original order.

    Ties keep the earlier token, so that a recomputation and every rank decide alike. Nothing here waits for the device:
    all sizes come from the layout and the counts.

    Args:
        scores: float [V], one per visual token in the order of ``layout.visual_index``; higher is more important.
        layout: the packed sequence the scores belong to.
        counts: S numbers of visual tokens to keep (host).

    Raises:
        ValueError: a count above what the sample has, or scores of another length.
    """
    if scores.shape != layout.visual_index.shape:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)}: the layout has {len(layout.visual_index)} visual tokens"
        )
    for sample, (count, present) in enumerate(zip(counts, layout.visual_counts)):
        if not 0 <= count <= present:
            raise ValueError(f"sample {sample} is to keep {count} visual tokens: it has {present}")
    starts = layout.visual_starts()
    ranked = [
        start + torch.sort(scores[start : start + present], descending=True, stable=True).indices[:count]
        for start, present, count in zip(starts, layout.visual_counts, counts)
    ]
    # Positions of the kept visual tokens, rising again: samples are contiguous and in order.
    empty = layout.visual_index[:0]
    kept_visual = layout.visual_index[torch.cat([empty, *ranked]).sort().values]
    keep = torch.ones(layout.num_tokens, dtype=torch.bool, device=scores.device)
    keep[layout.visual_index] = False
    keep[kept_visual] = True
    num_kept = layout.num_tokens - sum(layout.visual_counts) + sum(counts)
    # New index of every kept token; scattering the old indices to them needs no nonzero(), whose size the host would
    # wait for.
    new_index = torch.cumsum(keep, 0) - 1
    slots = torch.where(keep, new_index, num_kept)
    old_index = torch.arange(layout.num_tokens, device=scores.device)
    kept = old_index.new_empty(num_kept + 1).scatter_(0, slots, old_index)[:num_kept]
    lengths = tuple(
        length - present + count for length, present, count in zip(layout.sample_lengths, layout.visual_counts, counts)
    )
    return Plan(
        kept=kept,
        layout=TokenLayout(
            sample_lengths=lengths,
            visual_counts=tuple(counts),
            query_counts=layout.query_counts,
            original_visual_counts=layout.original_visual_counts,
            visual_index=new_index[kept_visual],
            query_index=new_index[layout.query_index],
            origin=layout.origin[kept],
            position=layout.position[kept],
            cu_seqlens=cumulative_lengths(lengths, scores.device),
        ),
    )
