"""Importance read from a layer's output instead of from what its mixer computes.

Shape letters: L tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.merge import Ranking, most_similar


@dataclass(frozen=True)
class OutputNormScorer:
    """UTRC (Zhan et al., EMNLP 2024): among the less important, those go that resemble a more important one most.

    Importance is ``S_t = mean_c max(0, y_tc)``. The less important half of a sample is matched to the other half by
    cosine, and of it the most similar tokens go. Where more than half must go at once, the less important side is as
    large as what must go. Here y is the residual stream behind the layer, the one output that all kinds of layers have
    in common; the paper's model has Mamba layers only and takes the scan's output.
    """

    def output(self, hidden: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """Ranks the visual tokens by what a layer has put out.

        Args:
            hidden: [L, D] hidden states behind the layer, all channels.
            layout: the packed sequence that left the layer.
            counts: S numbers of visual tokens that stay (host).
        """
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
