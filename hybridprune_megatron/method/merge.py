"""Dropped tokens that are averaged into kept ones, and the search for who is most alike.

Only hidden states are merged. A merged token stands where the kept token of its group stood, with that token's position
and place in the scan; groups never cross samples. Averages are plain means over the tokens that one reduction brings
together: how many tokens an earlier reduction put into each of them is not carried along (as in UTRC; ToMe, which
weights by size, is asked once, before the model, where its weighted mean of means is the mean of the whole group).

Shape letters: L tokens, V visual tokens, D width, J candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.plan import Plan

# Rows and candidates compared at once: memory is O(block^2), never V x V.
_BLOCK = 1024


@dataclass(frozen=True)
class Ranking:
    """Who stays, and who would take the others in.

    Attributes:
        scores: float32 [V] in the order of ``layout.visual_index``; the highest of every sample stay.
        partner: int64 [V], for every token that goes the one it is averaged into, as an index into
            ``layout.visual_index``; None: the most similar token that stays.
    """

    scores: Tensor
    partner: Tensor | None = None


def most_similar(rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the candidate of the highest cosine; of equal ones the first.

    Args:
        rows: [V, D].
        candidates: [J, D], at least one if there are rows.

    Returns:
        int64 [V] indices into ``candidates`` and float32 [V] cosines.
    """
    assert len(candidates) or not len(rows), f"{len(rows)} rows and nothing to compare them with"
    candidates = nn.functional.normalize(candidates.float(), dim=-1)
    indices, cosines = [], []
    for block in rows.split(_BLOCK):
        block = nn.functional.normalize(block.float(), dim=-1)
        index = torch.zeros(len(block), dtype=torch.int64, device=rows.device)
        best = torch.full((len(block),), float("-inf"), device=rows.device)
        for start in range(0, len(candidates), _BLOCK):
            cosine, at = (block @ candidates[start : start + _BLOCK].T).max(-1)
            index = torch.where(cosine > best, at + start, index)
            best = torch.maximum(cosine, best)
        indices.append(index)
        cosines.append(best)
    return torch.cat(indices), torch.cat(cosines)


def group_means(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean of the rows of every group; differentiable, and without atomics, so that every rank finds the same bits.

    Args:
        values: [V, ...].
        group: int64 [V], from 0 to ``num_groups`` - 1; every group has a row.
        num_groups: number of groups (host).

    Returns:
        [num_groups, ...] in the dtype of ``values``; a group of one row is bitwise that row.
    """
    sizes = torch.zeros(num_groups, dtype=torch.int64, device=values.device).scatter_add_(
        0, group, torch.ones_like(group)
    )
    together = values.float().index_select(0, torch.argsort(group, stable=True))
    return torch.segment_reduce(together, "mean", lengths=sizes, axis=0, unsafe=True).to(values.dtype)


def take_merged(hidden: Tensor, layout: TokenLayout, plan: Plan, partner: Tensor | None = None) -> Tensor:
    """As ``plan.take(hidden)``, with every dropped visual token averaged into a kept one of its sample.

    Args:
        hidden: [L, ...] before the reduction.
        layout: the packed sequence before the reduction.
        plan: the reduction; a sample that drops something keeps something.
        partner: int64 [V], for every dropped visual token the kept one that it goes into, as an index into
            ``layout.visual_index``; None: the one of the highest cosine between their hidden states.

    Returns:
        [L', ...]; gradients reach every visual token, dropped or not.
    """
    visual = hidden.index_select(0, layout.visual_index)
    with torch.no_grad():
        group = _groups(visual.flatten(1), layout, plan, partner)
    means = group_means(visual, group, sum(plan.layout.visual_counts))
    return plan.take(hidden).index_copy(0, plan.layout.visual_index, means)


def _groups(visual: Tensor, layout: TokenLayout, plan: Plan, partner: Tensor | None) -> Tensor:
    """int64 [V]: the kept visual token (counted over the packed sequence) that each visual token ends up in."""
    is_kept = torch.zeros(layout.num_tokens, dtype=torch.bool, device=visual.device).index_fill(0, plan.kept, True)
    is_kept = is_kept.index_select(0, layout.visual_index)
    # Number of a kept token among the kept ones.
    group = torch.cumsum(is_kept, 0) - 1
    kept_before = 0
    for start, present, count in zip(layout.visual_starts(), layout.visual_counts, plan.layout.visual_counts):
        if count < present:
            assert count, f"{present} visual tokens dropped and none kept to average them into"
            # Of sizes the host knows, so nothing waits for the device.
            flags = is_kept[start : start + present]
            dropped = start + torch.nonzero_static(~flags, size=present - count).flatten()
            if partner is None:
                kept = start + torch.nonzero_static(flags, size=count).flatten()
                group[dropped] = kept_before + most_similar(visual[dropped], visual[kept])[0]
            else:
                group[dropped] = group[partner[dropped]]
        kept_before += count
    return group
