"""Causal depthwise convolution over packed samples: plain torch, and on CPUs the native operator that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hybridprune_megatron.ops.native import native_on_cpu

# Elements of a product that is summed at once in backward: 512 KiB in float32, well inside a core's cache.
_BLOCK_ELEMENTS = 1 << 17


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, sample_lengths: Sequence[int]) -> Tensor:
    """``y_i = bias + sum_k weight[:, k] x_{i - (W - 1) + k}``, with taps before the start of a sample left out.

    Args:
        x: [L, channels] packed samples one after another.
        weight: [channels, W] taps, the last one multiplies the token itself.
        bias: [channels].
        sample_lengths: lengths of the samples (host), sum L.

    Returns:
        [L, channels], dtype of ``x``.
    """
    return _CausalConv.apply(x, weight, bias, tuple(sample_lengths))


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, sample_lengths: Sequence[int]) -> Tensor:
    """``silu(causal_conv(...))``; natively bitwise the same with and without gradients, as recomputation needs."""
    ops = native_on_cpu(x, weight, bias)
    if ops is None:
        return nn.functional.silu(causal_conv(x, weight, bias, sample_lengths))
    if not torch.is_grad_enabled():
        return ops.causal_conv(x, weight, bias, _offsets(sample_lengths), True)
    return _NativeConvSilu.apply(ops, x, weight, bias, tuple(sample_lengths))


class _CausalConv(torch.autograd.Function):
    """One convolution with W - 1 rows of zeros around every sample.

    Its backward is written out because torch's own, of a depthwise convolution on a CPU, takes twenty times as long as
    its forward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lengths = lengths
        gap = weight.shape[1] - 1
        return _joined(_convolve(_spread(x, lengths, gap), weight, bias), lengths, gap)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_gradients(grad_y, x, weight, ctx.lengths), None


class _NativeConvSilu(torch.autograd.Function):
    """Convolution and SiLU; backward keeps what lies between them."""

    @staticmethod
    def forward(ctx: Any, ops: Any, x: Tensor, weight: Tensor, bias: Tensor, lengths: tuple[int, ...]) -> Tensor:
        offsets = _offsets(lengths)
        ctx.save_for_backward(x, weight, ops.causal_conv(x, weight, bias, offsets, False))
        ctx.lengths = lengths
        return ops.causal_conv(x, weight, bias, offsets, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, convolved = ctx.saved_tensors
        grad_y = torch.ops.aten.silu_backward(grad, convolved)
        return None, *_gradients(grad_y, x, weight, ctx.lengths), None


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias of a convolution."""
    gap = weight.shape[1] - 1
    # A token is read by itself and the W - 1 tokens after it, so the first zeros do not count.
    grad_rows = _spread(grad_y, lengths, gap)[gap:]
    grad_x = _joined(_convolve(grad_rows, weight.flip(1), None), lengths, gap)
    rows = _spread(x, lengths, gap)
    grad_taps = weight.new_zeros(gap + 1, weight.shape[0])
    step = max(1, _BLOCK_ELEMENTS // weight.shape[0])
    for start in range(0, len(grad_rows) - gap, step):
        stop = min(start + step, len(grad_rows) - gap)
        for tap in range(gap + 1):
            grad_taps[tap] += (grad_rows[start:stop] * rows[start + tap : stop + tap]).sum(0)
    return grad_x, grad_taps.T, grad_y.sum(0)


def _offsets(lengths: Sequence[int]) -> Tensor:
    """int64 [S + 1] starts of the samples and their end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def _spans(lengths: tuple[int, ...], gap: int) -> Iterator[slice]:
    """Rows of every sample when ``gap`` rows follow each."""
    for number, (start, length) in enumerate(zip(accumulate(lengths, initial=0), lengths)):
        yield slice(start + number * gap, start + number * gap + length)


def _spread(values: Tensor, lengths: tuple[int, ...], gap: int) -> Tensor:
    """[L, channels] -> [L + (S + 1) * gap, channels]: ``gap`` zeros before, between and after the samples."""
    spread = values.new_empty(len(values) + (len(lengths) + 1) * gap, values.shape[1])
    spread[:gap] = 0
    for span, rows in zip(_spans(lengths, gap), values.split(lengths)):
        spread[gap + span.start : gap + span.stop] = rows
        spread[gap + span.stop : span.stop + 2 * gap] = 0
    return spread


def _joined(values: Tensor, lengths: tuple[int, ...], gap: int) -> Tensor:
    """The samples' rows [L, channels] where ``gap`` other rows follow each."""
    parts = [values[span] for span in _spans(lengths, gap)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[K, channels] -> [K - W + 1, channels]; an image of one line with its channels last needs no copy."""
    image = rows[None, None].permute(0, 3, 1, 2)
    y = nn.functional.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).squeeze((0, 1))
