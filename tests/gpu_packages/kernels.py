"""What the mixer takes from causal-conv1d and mamba_ssm; see the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridprune_megatron.ops.conv import causal_conv
from hybridprune_megatron.ops.norm import gated_rms_norm
from hybridprune_megatron.ops.ssd import ssd_scan


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [batch, channels, L] -> the same."""
    batch, channels, length = x.shape
    assert x.stride(1) == 1, "seq_idx is only supported for channel last layout"
    assert x.stride(2) > 1, "seq_idx is only supported for channel last layout"
    assert channels % 8 == 0, channels
    assert x.stride(2) % 8 == x.stride(0) % 8 == 0, x.stride()
    assert weight.shape[0] == channels
    assert 2 <= weight.shape[1] <= 4
    assert bias is not None
    assert bias.shape == (channels,)
    assert bias.dtype == weight.dtype
    assert bias.stride(-1) == 1
    assert seq_idx is not None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (batch, length)
    assert batch == 1
    assert activation in ("silu", "swish")
    assert initial_states is None
    assert not return_final_states
    y = causal_conv(x[0].T, weight, bias, _lengths(seq_idx[0]))
    return nn.functional.silu(y).T.unsqueeze(0)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor:
    """x [batch, L, heads, width] -> the same."""
    batch, length, heads, _ = x.shape
    groups, state = B.shape[2:]
    assert heads % groups == 0
    assert B.shape == C.shape == (batch, length, groups, state)
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert A.dtype == torch.float32
    assert D is not None
    assert D.shape == (heads,)
    assert seq_idx is not None
    assert seq_idx.shape == (batch, length)
    assert x.dtype == B.dtype == C.dtype
    assert x.stride(-1) == 1
    assert z is dt_bias is initial_states is None
    # The mixer's dt is behind its bias and softplus; a second one would go unnoticed by shapes.
    assert not dt_softplus
    assert bool((dt >= 0).all())
    return ssd_scan(x[0], dt[0], A, B[0], C[0], D, seq_idx[0], chunk_size).unsqueeze(0)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """x [L, channels] -> the same."""
    assert z is not None
    assert z.shape == x.shape
    assert weight.shape == (x.shape[-1],)
    assert group_size is not None
    assert x.shape[-1] % group_size == 0
    assert bias is None
    assert not norm_before_gate, "the gate comes first in this family"
    assert eps == 1e-5
    return gated_rms_norm(x, z, weight, group_size)


def _lengths(seq_idx: Tensor) -> list[int]:
    return torch.unique_consecutive(seq_idx, return_counts=True)[1].tolist()
