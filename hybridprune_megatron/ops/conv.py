"""Causal depthwise convolution over packed samples, plain torch."""

from __future__ import annotations

from torch import Tensor, nn


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """``y_i = bias + sum_k weight[:, k] x_{i - (W - 1) + k}``, with taps before the start of a sample left out.

    Args:
        x: [L, channels] packed samples one after another.
        weight: [channels, W] taps, the last one multiplies the token itself.
        bias: [channels].
        position: int64 [L] distance of each token from the start of its sample in the packed sequence.

    Returns:
        [L, channels], dtype of ``x``.
    """
    width = weight.shape[1]
    y = x * weight[:, -1] + bias
    for shift in range(1, width):
        shifted = nn.functional.pad(x, (0, 0, shift, 0))[: x.shape[0]]
        y = y + (shifted * (position >= shift).unsqueeze(1)) * weight[:, width - 1 - shift]
    return y
