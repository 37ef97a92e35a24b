"""Importance read from a layer's output instead of from what its mixer computes.

Shape letters: L tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hybridprune_megatron.layers.operations import Cost, elementwise, most_similar_cost
from hybridprune_megatron.method.scorer import OutputScorer

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.merge import Ranking


@dataclass(frozen=True)
class OutputNormScorer(OutputScorer):
    """UTRC (Zhan et al., EMNLP 2024): among the less important, those go that resemble a more important one most.

    Importance is ``S_t = mean_c max(0, y_tc)``. The less important half of a sample is matched to the other half by
    cosine, and of it the most similar tokens go. Where more than half must go at once, the less important side is as
    large as what must go. Here y is the residual stream after the layer, the one output that all kinds of layers have
    in common; the paper's model has Mamba layers only and takes the scan's output.
    """

    name: ClassVar[str] = "utrc"
    pairs_tokens: ClassVar[bool] = True

    def rank(self, hidden: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        import torch

        from hybridprune_megatron.method.merge import Ranking, most_similar

        scores = torch.zeros(len(layout.visual_index), device=hidden.device)
        partner = torch.arange(len(layout.visual_index), device=hidden.device)
        for start, present, count in zip(layout.visual_starts(), layout.visual_counts, counts):
            if count == present:
                continue
            visual = hidden[layout.visual_index[start : start + present]]
            importance = torch.relu(visual.float()).mean(-1)
            order = torch.sort(importance, descending=True, stable=True).indices
            less = max(present // 2, present - count)
            more_important, less_important = order[: present - less], order[present - less :]
            match, cosine = most_similar(visual[less_important], visual[more_important])
            # Above every cosine, so that the more important side stays whole.
            scores[start + more_important] = 2.0
            scores[start + less_important] = -cosine
            partner[start + less_important] = start + more_important[match]
        return Ranking(scores, partner)

    def drop_costs(self, visual: int, left: int, hidden: int, width: int) -> Mapping[str, Cost]:
        # Of the less important half every token is compared with all of the other half.
        less = max(visual // 2, visual - left)
        return {
            "importance": elementwise(visual * hidden, width),
            "match": most_similar_cost(less, visual - less, hidden, width),
        }
