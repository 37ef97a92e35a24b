"""Query-conditioned scores: how much the question's tokens read from each visual token in one layer.

Shape letters: L tokens, V visual tokens, T query tokens, H heads, K key-value heads, E head width, G groups, N state
size. All scores are float32 [V] in the order of ``TokenLayout.visual_index``; higher is more important.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals

# Keys (or visual tokens) per block of the two-pass products: memory is O(T * H * block), never L x L.
_BLOCK = 1024


@dataclass(frozen=True)
class QueryScorer:
    """Attention: softmax mass from the question. Mamba: implicit attention from the question.

    Attributes:
        mamba_decay: whether the Mamba score keeps the factor exp(a_i - a_j), which sinks early frames whatever they
            show. The decay-free score is one pass over B.
    """

    mamba_decay: bool = False

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor:
        """``s_j = mean_{i in T, h} softmax_j'(q_ih . k_j'h / sqrt(E))_j`` over the keys row i may see."""
        del layer
        return attention_mass(signals, layout)

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor:
        """Implicit attention of Mamba-2 with or without its decay."""
        del layer
        return implicit_attention(signals, layout) if self.mamba_decay else decay_free(signals, layout)


def attention_mass(signals: AttentionSignals, layout: TokenLayout) -> Tensor:
    """Mean softmax mass that the query rows put on every visual token: two passes over the keys, O(T + L) kept.

    Pass one finds each row's log-sum-exp over its visible keys, pass two sums the normalised columns.

    Args:
        signals: q [L, H, E] and k [L, K, E] of one layer, this rank's heads.
        layout: the packed sequence.

    Returns:
        float32 [V], summing to at most 1 within a sample.
    """
    scores = [signals.q.new_empty(0, dtype=torch.float32)]
    for visual, rows, first, last in _scorable(layout):
        num_kv_heads = signals.k.shape[1]
        q = signals.q[rows].float() * signals.q.shape[-1] ** -0.5
        q = q.unflatten(1, (num_kv_heads, -1))
        log_sum = q.new_full(q.shape[:3], float("-inf"))
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            columns = torch.arange(start, stop, device=q.device)
            logits = _masked_logits(q, signals.k[start:stop], rows, columns)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(logits, -1))
        mass = []
        for block in visual.split(_BLOCK):
            logits = _masked_logits(q, signals.k[block], rows, block)
            mass.append(torch.exp(logits - log_sum.unsqueeze(-1)).mean((0, 1, 2)))
        scores.append(torch.cat(mass))
    return torch.cat(scores)


def _masked_logits(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[T, K, H/K, J] scaled products of the query rows with a block of keys; keys after the row are -inf."""
    logits = torch.einsum("tkre,jke->tkrj", q, k.float())
    return logits.masked_fill((columns > rows.unsqueeze(1))[:, None, None, :], float("-inf"))


def decay_free(signals: MambaSignals, layout: TokenLayout) -> Tensor:
    """``s_j = (1/H) sum_h dt_jh B_j^g(h) . Cbar^g(h)``, ``Cbar`` the mean of C over the query tokens.

    Args:
        signals: B, C [L, G, N] after convolution and SiLU, dt [L, H] after softplus; this rank's heads.
        layout: the packed sequence.

    Returns:
        float32 [V].
    """
    heads_per_group = signals.dt.shape[1] // signals.B.shape[1]
    scores = [signals.B.new_empty(0, dtype=torch.float32)]
    for visual, rows, _, _ in _scorable(layout):
        mean_c = signals.C[rows].float().mean(0)
        products = (signals.B[visual].float() * mean_c).sum(-1)
        steps = signals.dt[visual].float().unflatten(1, (-1, heads_per_group)).mean(-1)
        scores.append((products * steps).mean(-1))
    return torch.cat(scores)


def implicit_attention(signals: MambaSignals, layout: TokenLayout) -> Tensor:
    """``s_j = mean_{i in T, h} 1[i >= j] (C_i . B_j) exp(a_ih - a_jh) dt_jh``, ``a`` the running sum of dt A.

    Args:
        signals: as for ``decay_free``, and A [H] < 0.
        layout: the packed sequence.

    Returns:
        float32 [V].
    """
    heads_per_group = signals.dt.shape[1] // signals.B.shape[1]
    scores = [signals.B.new_empty(0, dtype=torch.float32)]
    for visual, rows, first, last in _scorable(layout):
        # Summed from the sample's start in float64: differences of long sums are what counts.
        log_decay = torch.cumsum(signals.dt[first:last].double() * signals.A.double(), 0)
        rows_c = signals.C[rows].float()
        parts = []
        for block in visual.split(_BLOCK // 4):
            gap = (log_decay[rows - first].unsqueeze(1) - log_decay[block - first]).float()
            gap = gap.masked_fill((block > rows.unsqueeze(1)).unsqueeze(-1), float("-inf"))
            weight = torch.exp(gap) * signals.dt[block].float()
            products = torch.einsum("tgn,jgn->tjg", rows_c, signals.B[block].float())
            per_group = weight.unflatten(-1, (-1, heads_per_group)).mean(-1)
            parts.append((products * per_group).mean((0, 2)))
        scores.append(torch.cat(parts))
    return torch.cat(scores)


def _scorable(layout: TokenLayout) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Positions of visual and of query tokens, first token and end of every sample that shows something.

    Raises:
        ValueError: a sample shows something and asks nothing.
    """
    starts, query_starts, visual_starts = layout.sample_starts(), layout.query_starts(), layout.visual_starts()
    for sample, (visual_count, query_count) in enumerate(zip(layout.visual_counts, layout.query_counts)):
        if not visual_count:
            continue
        if not query_count:
            raise ValueError(
                f"sample {sample} of the packed sequence has {visual_count} visual tokens and no question to score "
                "them by: give its first user turn some text, or choose reduction=uniform"
            )
        visual = layout.visual_index[visual_starts[sample] : visual_starts[sample + 1]]
        rows = layout.query_index[query_starts[sample] : query_starts[sample + 1]]
        yield visual, rows, starts[sample], starts[sample + 1]
