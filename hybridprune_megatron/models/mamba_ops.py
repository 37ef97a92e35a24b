"""Convolution and scan with one interface: ``ops/`` anywhere, causal-conv1d and mamba_ssm kernels on a GPU."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from hybridprune_megatron.models.packed import LayerPacking
from hybridprune_megatron.ops.conv import causal_conv_silu
from hybridprune_megatron.ops.norm import GATED_NORM_EPSILON, gated_rms_norm
from hybridprune_megatron.ops.ssd import ssd_scan


class MambaOps(Protocol):
    """Convolution and scan of a packed sequence; both implementations are below."""

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, packing: LayerPacking) -> Tensor:
        """[L, channels] -> [L, channels], causal within samples, followed by SiLU."""
        ...

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, packing: LayerPacking, chunk_size: int
    ) -> Tensor:
        """SSD scan; shapes as in ``ops.ssd.ssd_scan``."""
        ...

    def gated_norm(self, y: Tensor, z: Tensor, weight: Tensor, group_width: int) -> Tensor:
        """``rms_norm(y * silu(z))``; shapes as in ``ops.norm.gated_rms_norm``."""
        ...


class TorchMambaOps:
    """Those of ``ops/``: plain torch on any device, native operators on a CPU where ``kernels/`` is installed."""

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, packing: LayerPacking) -> Tensor:
        return causal_conv_silu(x, weight, bias, packing.layout.sample_lengths)

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, packing: LayerPacking, chunk_size: int
    ) -> Tensor:
        return ssd_scan(x, dt, A, B, C, D, packing.sample_index, chunk_size)

    def gated_norm(self, y: Tensor, z: Tensor, weight: Tensor, group_width: int) -> Tensor:
        return gated_rms_norm(y, z, weight, group_width)


#: mamba_ssm's kernels multiply a row's number by the distance between rows in 32 bits.
OFFSET_LIMIT = 2**31


def addressable(rows: Tensor) -> Tensor:
    """The same numbers, copied together where their last row lies beyond what mamba_ssm's kernels can address.

    Args:
        rows: [L, ...], often a view of a wider tensor.

    Raises:
        ValueError: even side by side they are too many.
    """
    length, width = len(rows), math.prod(rows.shape[1:])
    if length * rows.stride(0) < OFFSET_LIMIT:
        return rows
    if length * width < OFFSET_LIMIT:
        return rows.contiguous()
    raise ValueError(
        f"{length} tokens of {width} channels per rank: mamba_ssm's kernels address fewer than 2^31 numbers; raise "
        "parallel.tensor or parallel.context, or lower data.sequence_length"
    )


class KernelMambaOps:
    """The kernels of causal-conv1d and mamba_ssm; both stop at sample boundaries by ``seq_idx``."""

    def __init__(self) -> None:
        # Imported here: these packages exist on machines with a GPU only.
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        self._conv, self._scan, self._norm = causal_conv1d_fn, mamba_chunk_scan_combined, rmsnorm_fn

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, packing: LayerPacking) -> Tensor:
        # seq_idx needs channels-last memory, [1, channels, L] with the channels contiguous, and rows a multiple of 8
        # numbers apart, which those of the wider in_proj need not be.
        channels_last = x.contiguous().unsqueeze(0).transpose(1, 2)
        y = self._conv(channels_last, weight, bias, seq_idx=packing.seq_idx, activation="silu")
        return y.transpose(1, 2).squeeze(0)

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, packing: LayerPacking, chunk_size: int
    ) -> Tensor:
        x, dt, B, C = (addressable(tensor).unsqueeze(0) for tensor in (x, dt, B, C))
        # dt comes with its bias and after its softplus, for the scores need it too.
        y = self._scan(x, dt, A, B, C, chunk_size, D=D, seq_idx=packing.seq_idx, dt_softplus=False)
        return y.squeeze(0)

    def gated_norm(self, y: Tensor, z: Tensor, weight: Tensor, group_width: int) -> Tensor:
        y, z = addressable(y), addressable(z)
        return self._norm(y, weight, None, z=z, eps=GATED_NORM_EPSILON, group_size=group_width, norm_before_gate=False)
