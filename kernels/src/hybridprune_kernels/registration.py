"""Shapes without data (fake tensors) and gradients of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("hybridprune::attention_log_sum")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)


@torch.library.register_fake("hybridprune::attention_mass")
def _(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty(k.shape[0], dtype=torch.float32)


@torch.library.register_fake("hybridprune::mamba_score")
def _(B: Tensor, C: Tensor, dt: Any, log_decay: Any, visual_index: Tensor, *_: Any) -> Tensor:
    return B.new_empty(visual_index.shape[0], dtype=torch.float32)


@torch.library.register_fake("hybridprune::select")
def _(scores: Tensor, offsets: Tensor, kept_offsets: Tensor, num_kept: int) -> Tensor:
    return scores.new_empty(num_kept, dtype=torch.int64)


@torch.library.register_fake("hybridprune::gather")
def _(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0], *rows.shape[1:])


@torch.library.register_fake("hybridprune::gather_backward")
def _(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, *grad.shape[1:])


@torch.library.register_fake("hybridprune::causal_conv")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("hybridprune::rms_norm")
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 1)


@torch.library.register_fake("hybridprune::gated_rms_norm")
def _(y: Tensor, z: Tensor, weight: Tensor, group_width: int, epsilon: float) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[0], y.shape[1] // group_width, 1)


@torch.library.register_fake("hybridprune::ssd_scan")
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, index: Tensor, chunk: int) -> Any:
    return torch.empty_like(x), x.new_empty(-(-x.shape[0] // chunk) + 1, *x.shape[1:], B.shape[2])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    rows, index = inputs
    ctx.save_for_backward(index)
    ctx.num_rows = rows.shape[0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.hybridprune.gather_backward(grad, index, ctx.num_rows), None


def _remember_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_twice(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.hybridprune.gather(grad, index), None, None


torch.library.register_autograd("hybridprune::gather", _gather_backward, setup_context=_remember)
torch.library.register_autograd("hybridprune::gather_backward", _gather_twice, setup_context=_remember_backward)
