"""RMSNorm and Mamba-2's gated norm, with backward passes that save only inputs and one scale a row.

Plain torch, and on CPUs the native operators that equal it. torch's ``rms_norm`` is one kernel on a GPU; on a CPU it is
six, and twice as many in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridprune_megatron.ops.native import native_on_cpu

# Hard-coded in megatron-core and in the original code, whatever the layer norm's epsilon is.
GATED_NORM_EPSILON = 1e-5


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension, computed in float32.

    Args:
        x: [..., width].
        weight: [width].
        epsilon: added to the mean square.

    Returns:
        [..., width], dtype of ``x``.
    """
    if x.device.type != "cpu":
        return nn.functional.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, epsilon).view(x.shape)


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
    return _GatedRMSNorm.apply(y, z, weight, group_width)


class _RMSNorm(torch.autograd.Function):
    """[L, width] -> [L, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ops = native_on_cpu(x, weight)
        if ops is not None:
            out, scale = ops.rms_norm(x, weight, epsilon)
            ctx.save_for_backward(x, weight, scale)
            return out
        x_f = _float(x)
        scale = _inverse_rms(x_f, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x_f * scale).mul_(_float(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = _rms_backward(_float(grad), _float(x), _float(weight), scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _GatedRMSNorm(torch.autograd.Function):
    """[L, channels] twice -> [L, channels]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group_width: int) -> Tensor:
        ops = native_on_cpu(y, z, weight)
        if ops is not None:
            out, scale = ops.gated_rms_norm(y, z, weight, group_width, GATED_NORM_EPSILON)
            ctx.save_for_backward(y, z, weight, scale)
            return out
        gated = nn.functional.silu(_float(z)).mul_(_float(y))
        groups = gated.unflatten(1, (-1, group_width))
        scale = _inverse_rms(groups, GATED_NORM_EPSILON)
        ctx.save_for_backward(y, z, weight, scale)
        groups.mul_(scale)
        return gated.mul_(_float(weight)).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, scale = ctx.saved_tensors
        y_f, z_f = _float(y), _float(z)
        gate = nn.functional.silu(z_f)
        grad_f, gated, weight_f = (
            t.unflatten(-1, (scale.shape[1], -1)) for t in (_float(grad), y_f * gate, _float(weight))
        )
        grad_gated, grad_weight = _rms_backward(grad_f, gated, weight_f, scale)
        grad_gated = grad_gated.flatten(1)
        grad_y = gate.mul_(grad_gated)
        grad_z = torch.ops.aten.silu_backward(grad_gated.mul_(y_f), z_f)
        return grad_y.to(y.dtype), grad_z.to(z.dtype), grad_weight.flatten().to(weight.dtype), None


def _float(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """[..., width] -> [..., 1] ``1 / sqrt(mean(x^2) + epsilon)``."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _rms_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of ``y = x * scale * weight`` with ``scale = 1 / sqrt(mean(x^2) + epsilon)``.

    ``dx = scale * (w g - x scale^2 mean(w g x))`` and ``dw = sum over rows of g x scale``.

    Args:
        grad: [L, ..., width].
        x: as ``grad``.
        weight: [..., width].
        scale: [L, ..., 1].
    """
    product = grad * x
    grad_weight = (product * scale).sum(0)
    mean = (product.mul_(weight)).mean(-1, keepdim=True)
    grad_x = (grad * weight).mul_(scale)
    return grad_x.addcmul_(x, mean.mul_(scale.pow(3)), value=-1), grad_weight
