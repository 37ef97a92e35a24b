"""Mamba-2's gated norm."""

from __future__ import annotations

from torch import Tensor, nn

# Hard-coded in megatron-core and in the original code, whatever the layer norm's epsilon is.
GATED_NORM_EPSILON = 1e-5


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_width: int) -> Tensor:
    """``rms_norm(y * silu(z)) * weight`` over groups of channels, computed in float32.

    Args:
        y: [L, channels].
        z: [L, channels], the gate.
        weight: [channels].
        group_width: channels normalised together.

    Returns:
        [L, channels], dtype of ``y``.
    """
    gated = (y.float() * nn.functional.silu(z.float())).unflatten(-1, (-1, group_width))
    normed = nn.functional.rms_norm(gated, (group_width,), None, GATED_NORM_EPSILON).flatten(-2)
    return (normed * weight.float()).to(y.dtype)
