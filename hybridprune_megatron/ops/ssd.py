"""Mamba-2's scan (SSD) over packed samples, plain torch: what every kernel is compared with.

Per head: ``h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T``, ``y_i = h_i C_i + D x_i``, with h = 0 before the first token
    of a sample.

Within chunks of Q tokens the scan is a masked matrix product, between chunks a short recurrence over states; nothing
L x L or L x Q is stored (Dao and Gu, "Transformers are SSMs", 2024, section 6). Sums of dt A are taken in float32
inside a chunk, so they stay short.

Shape letters: L tokens, Q tokens a chunk, H heads, P head width, G groups, R = H / G, N state size, S samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hybridprune_megatron.ops.ssd_blocks import ChunkedScan


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sample_index: Tensor,
    chunk_size: int = 128,
) -> Tensor:
    """The scan of a packed sequence.

    Args:
        x: [L, H, P] inputs.
        dt: float32 [L, H] step sizes after softplus; 0 skips a token exactly.
        A: float32 [H], below 0.
        B: [L, G, N].
        C: [L, G, N].
        D: [H] skip weights.
        sample_index: int [L], never falling, which sample a token belongs to; states do not cross samples.
        chunk_size: Q.

    Returns:
        [L, H, P], dtype of ``x``.
    """
    num_groups = B.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_g, dt_g = (t.to(dtype).unflatten(1, (num_groups, -1)) for t in (x, dt))
    A_g, D_g = (t.to(dtype).unflatten(0, (num_groups, -1)) for t in (A, D))
    y = ChunkedScan.apply(x_g, dt_g, A_g, B.to(dtype), C.to(dtype), D_g, sample_index, chunk_size)
    return y.flatten(1, 2).to(x.dtype)


def ssd_final_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor, sample_index: Tensor) -> Tensor:
    """State after the last token of every sample, for decoding on.

    Args:
        x, dt, A, B, sample_index: as in ``ssd_scan``.
        cu_seqlens: int [S + 1] starts of the samples; no sample is empty.

    Returns:
        float32 [S, H, P, N].
    """
    num_samples, (_, num_heads, head_dim) = len(cu_seqlens) - 1, x.shape
    # exp(a_last - a_j) with both sums taken from the sample's own end backwards, so that nothing large cancels.
    log_decay = torch.cumsum(dt.double() * A.double(), 0)
    last = cu_seqlens[1:].long() - 1
    weight = torch.exp((log_decay[last][sample_index.long()] - log_decay).float()) * dt
    weighted = (x.float() * weight.unsqueeze(-1)).unflatten(1, (B.shape[1], -1))
    states = x.new_zeros(num_samples, num_heads, head_dim, B.shape[2], dtype=torch.float32)
    # One host copy of the boundaries; samples are contiguous, so each is a slice and B is never repeated per head.
    starts = cu_seqlens.tolist()
    for sample, (start, stop) in enumerate(pairwise(starts)):
        written = torch.einsum("lgrp,lgn->grpn", weighted[start:stop], B[start:stop].float())
        states[sample] = written.flatten(0, 1)
    return states


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the scan for each of S samples.

    Args:
        x: [S, H, P]; dt: float32 [S, H]; A: float32 [H]; B, C: [S, G, N]; D: [H]; state: float32 [S, H, P, N].

    Returns:
        y [S, H, P] in the dtype of ``x`` and the new state.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B_heads = B.float().repeat_interleave(heads_per_group, 1)
    C_heads = C.float().repeat_interleave(heads_per_group, 1)
    write = (x.float() * dt.unsqueeze(-1)).unsqueeze(-1) * B_heads.unsqueeze(2)
    state = state * torch.exp(dt * A)[..., None, None] + write
    y = (state * C_heads.unsqueeze(2)).sum(-1) + x.float() * D.float().unsqueeze(-1)
    return y.to(x.dtype), state
