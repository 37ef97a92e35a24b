"""One reduction: which tokens of a packed sequence stay. Decided once, applied to everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.operators import highest
from hybridprune_megatron.ops.native import native


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
        ops = native(values) if dim == 0 else None
        return values.index_select(dim, self.kept) if ops is None else ops.gather(values, self.kept)


def select(
    scores: Tensor,
    layout: TokenLayout,
    counts: Sequence[int],
    min_per_frame: int = 0,
    runs: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """Keeps the highest-scored visual tokens of every sample and all other tokens, in their original order.

    Ties keep the earlier token, so that a recomputation and every rank decide alike. Nothing here waits for the device:
    all sizes come from the layout and the counts.

    Args:
        scores: float [V], one per visual token in the order of ``layout.visual_index``; higher is more important.
        layout: the packed sequence the scores belong to.
        counts: S numbers of visual tokens to keep (host); they are met exactly.
        min_per_frame: the best tokens of every frame that go before all others: first the best of every frame, then the
            second best, up to this number. A count too small for that keeps as many rounds as fit, and of the round
            that does not fit the highest scores.
        runs: lengths of runs of visual tokens that compete with each other, and how many of each stay (host); None: a
            sample is one run. Both add up over a sample to what it has and to its count.

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
    chosen = chosen_visual(scores, layout.visual_frame, list(runs or zip(layout.visual_counts, counts)), min_per_frame)
    kept_visual = layout.visual_index[chosen]
    keep = torch.ones(layout.num_tokens, dtype=torch.bool, device=scores.device)
    keep[layout.visual_index] = False
    keep[kept_visual] = True
    num_kept = layout.num_tokens - sum(layout.visual_counts) + sum(counts)
    # Of a size the host knows, so that nothing waits for the device.
    kept = torch.nonzero_static(keep, size=num_kept).flatten()
    return Plan(kept, layout.taken(kept, counts))


def chosen_visual(scores: Tensor, frames: Tensor, runs: Sequence[tuple[int, int]], min_per_frame: int) -> Tensor:
    """int64, rising: the visual tokens that stay; arguments as for ``select``, frames those of the scores."""
    ops = native(scores) if not min_per_frame and scores.dtype == torch.float32 else None
    if ops is not None:
        return highest(ops, scores, runs)
    ranked, start = [torch.empty(0, dtype=torch.int64, device=scores.device)], 0
    for present, count in runs:
        order = torch.sort(scores[start : start + present], descending=True, stable=True).indices
        if min_per_frame:
            rounds = _place_in_frame(frames[start : start + present][order]).clamp(max=min_per_frame)
            order = order[torch.sort(rounds, stable=True).indices]
        ranked.append(start + order[:count])
        start += present
    # Rising again: runs are contiguous and in order.
    return torch.cat(ranked).sort().values


def _place_in_frame(frames: Tensor) -> Tensor:
    """int64 [V]: how many earlier entries name the same frame."""
    by_frame = torch.sort(frames, stable=True)
    places = torch.arange(len(frames), device=frames.device)
    starts = torch.where(by_frame.values == by_frame.values.roll(1), 0, places)
    # A single frame has no border that the roll would show; its start is 0 either way.
    return torch.empty_like(places).scatter_(0, by_frame.indices, places - starts.cummax(0).values)
