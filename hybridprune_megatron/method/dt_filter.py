"""LongMamba's filter of step sizes (Ye et al., ICLR 2025): Mamba heads with a long memory write fewer tokens into it.

It removes no token: every layer computes what it did before, so prefill gets no faster. A step of 0 is the exact skip
of the recurrence, no write and no decay.

Shape letters: L tokens, V visual tokens, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout

# Share of a state that must outlive the trained length for a head to count as global; the paper's threshold.
GLOBAL_DECAY = 0.05


def filtered_steps(dt: Tensor, A: Tensor, layout: TokenLayout, share: float) -> Tensor:
    """Step sizes with the smallest of the visual tokens set to 0 in global heads.

    The trained length is given as a share of a sample's visual tokens, so the trained total of a head is ``share *
    sum_t dt_th`` over them. A head is global if ``exp(A_h * trained total)`` stays above 0.05, and then keeps its
    largest steps until they add up to that total. Only visual tokens count and only they are filtered: an answer must
    not change what its question sees.

    Args:
        dt: float32 [L, H] step sizes after softplus; this rank's heads.
        A: float32 [H], below 0.
        layout: the packed sequence.
        share: trained length over present length, in (0, 1].

    Returns:
        float32 [L, H]; gradients pass where a step is left.
    """
    if not layout.visual_counts:
        return dt
    with torch.no_grad():
        keep = [
            _kept(dt[visual].double(), A.double(), share) for visual in layout.visual_index.split(layout.visual_counts)
        ]
    visual = dt.index_select(0, layout.visual_index) * torch.cat(keep)
    return dt.index_copy(0, layout.visual_index, visual)


def _kept(dt: Tensor, A: Tensor, share: float) -> Tensor:
    """bool [V, H] of one sample: whether a head lets a token in."""
    total = share * dt.sum(0)
    ranked, order = torch.sort(dt, dim=0, descending=True, stable=True)
    # What the larger steps have filled already, before each token.
    filled = torch.cumsum(ranked, 0) - ranked
    keep = torch.zeros_like(dt, dtype=torch.bool).scatter(0, order, filled < total)
    return keep | ~(torch.exp(A * total) > GLOBAL_DECAY)
