"""Mamba-2's scan (SSD) over packed samples, plain torch: the specification that every kernel is compared with.

Per head: ``h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T``, ``y_i = h_i C_i + D x_i``, with h = 0 before the first token
    of a sample.

Within chunks of Q tokens the scan is a masked matrix product, between chunks a short recurrence over states; memory is
O(L * Q), never L x L (Dao and Gu, "Transformers are SSMs", 2024, section 6). Sums of dt A are taken in float32 inside a
chunk, so they stay short.

Shape letters: L tokens, c chunks, Q tokens a chunk, H heads, P head width, G groups, R = H / G, N state size, S
    samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


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
    length, num_heads, head_dim = x.shape
    num_groups = B.shape[1]
    chunks = _Chunks(dt, A, sample_index, chunk_size)
    x_c = chunks.split(x.float()).unflatten(2, (num_groups, -1))
    B_c, C_c = chunks.split(B.float()), chunks.split(C.float())
    dt_c = chunks.dt.unflatten(2, (num_groups, -1))
    weighted = x_c * dt_c.unsqueeze(-1)
    # Inside a chunk: y_i += sum_{j <= i, same sample} (C_i . B_j) exp(a_i - a_j) dt_j x_j
    products = torch.einsum("cign,cjgn->cgij", C_c, B_c)
    decay = chunks.decay_within().unflatten(1, (num_groups, -1))
    y = torch.einsum("cgrij,cjgrp->cigrp", products.unsqueeze(2) * decay, weighted)
    # From earlier chunks: y_i += exp(a_i) C_i . h, where h is the state that entered the chunk, if it is the same
    # sample's.
    entering = _entering_states(chunks, weighted, B_c)
    from_state = torch.einsum("cign,cgrpn->cigrp", C_c, entering.unflatten(1, (num_groups, -1)))
    y = y + from_state * chunks.decay_from_start().unflatten(2, (num_groups, -1)).unsqueeze(-1)
    y = y.reshape(-1, num_heads, head_dim)[:length]
    return (y + x.float() * D.float().unsqueeze(-1)).to(x.dtype)


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


class _Chunks:
    """Decays and sample masks of a packed sequence cut into chunks of Q tokens."""

    def __init__(self, dt: Tensor, A: Tensor, sample_index: Tensor, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.padding = -dt.shape[0] % chunk_size
        # Padding has dt = 0, which neither writes to a state nor decays it, and belongs to the last sample.
        self.dt = self.split(dt)
        self.log_decay = torch.cumsum(self.dt * A, 1)
        padded_index = torch.cat([sample_index, sample_index[-1:].expand(self.padding)])
        self.sample = padded_index.view(-1, chunk_size)
        self.last_sample = self.sample[:, -1]
        # The sample whose state enters a chunk; nothing enters the first.
        self.entering_sample = torch.cat([self.last_sample.new_full((1,), -1), self.last_sample[:-1]])

    def split(self, values: Tensor) -> Tensor:
        """[L, ...] -> [c, Q, ...], padded with zeros."""
        pad = (0, 0) * (values.dim() - 1) + (0, self.padding)
        return nn.functional.pad(values, pad).unflatten(0, (-1, self.chunk_size))

    def decay_within(self) -> Tensor:
        """[c, H, Q, Q] exp(a_i - a_j) for j <= i of the same sample, else 0."""
        log_decay = self.log_decay.transpose(1, 2)
        gap = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
        causal = torch.ones(self.chunk_size, self.chunk_size, dtype=torch.bool, device=gap.device).tril()
        same = self.sample.unsqueeze(2) == self.sample.unsqueeze(1)
        return torch.exp(gap.masked_fill(~(causal & same).unsqueeze(1), float("-inf")))

    def decay_from_start(self) -> Tensor:
        """[c, Q, H] decay of the entering state at each token, 0 where the token belongs to a later sample."""
        same = self.sample == self.entering_sample.unsqueeze(1)
        return torch.exp(self.log_decay) * same.unsqueeze(-1)

    def decay_to_end(self) -> Tensor:
        """[c, Q, H] decay of what each token wrote at the chunk's end, 0 for samples that have ended before it."""
        same = self.sample == self.last_sample.unsqueeze(1)
        return torch.exp(self.log_decay[:, -1:] - self.log_decay) * same.unsqueeze(-1)

    def decay_through(self) -> Tensor:
        """[c, H] decay of the entering state over the whole chunk, 0 if its sample ends in the chunk."""
        same = self.last_sample == self.entering_sample
        return torch.exp(self.log_decay[:, -1]) * same.unsqueeze(-1)


def _entering_states(chunks: _Chunks, weighted: Tensor, B_c: Tensor) -> Tensor:
    """[c, H, P, N] the state that enters every chunk."""
    num_groups = B_c.shape[2]
    to_end = chunks.decay_to_end().unflatten(2, (num_groups, -1)).unsqueeze(-1)
    written = torch.einsum("cjgrp,cjgn->cgrpn", weighted * to_end, B_c).flatten(1, 2)
    through = chunks.decay_through()[..., None, None]
    state = torch.zeros_like(written[0])
    entering = []
    for chunk in range(written.shape[0]):
        entering.append(state)
        state = state * through[chunk] + written[chunk]
    return torch.stack(entering)
