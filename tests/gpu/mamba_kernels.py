"""Convolution, scan and gated norm of the GPU packages against ``ops/``, on a GPU; run by ``test_mamba_kernels``.

python -m tests.gpu.mamba_kernels FOLDER [CHECK ...]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    # One configuration per kernel, with no timing runs to choose it.
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")

import torch
from torch import Tensor

from hybridprune_megatron.models.mamba_ops import OFFSET_LIMIT, addressable
from hybridprune_megatron.ops.norm import GATED_NORM_EPSILON, gated_rms_norm
from tests.programs import run_checks

#: One layer of the 12B model: heads, groups, head width, state size.
HEADS, GROUPS, WIDTH, STATE, CHUNK = 128, 8, 80, 128, 128
LENGTHS = (257, 1, 512, 130)
#: Distance between rows of z, a view of in_proj's output in the 12B model, and rows beyond what 32 bits reach.
STRIDE, LONG = 22_656, 100_000
#: Share of the norm by which a result may differ; bf16 has 8 bits.
ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 2**-6}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def _index() -> Tensor:
    counts = torch.tensor(LENGTHS, device="cuda")
    numbers = torch.arange(len(LENGTHS), dtype=torch.int32, device="cuda")
    return numbers.repeat_interleave(counts, output_size=sum(LENGTHS))


def _compared(
    name: str,
    values: Sequence[Tensor],
    dtype: torch.dtype,
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    kept: Sequence[int] = (),
) -> None:
    """Outputs and gradients of both, ours in float32 of the same numbers.

    Args:
        values: float32 inputs.
        dtype: of theirs.
        kept: indices of the inputs that stay in float32.

    Raises:
        AssertionError: something differs by more than ``ALLOWED``.
    """
    rounded = [value if number in kept else value.to(dtype) for number, value in enumerate(values)]
    found: list[list[Tensor]] = []
    for run, inputs in ((theirs, rounded), (ours, [value.float() for value in rounded])):
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        out = run(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        (out.float() * weight).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        assert error < ALLOWED[dtype], (name, dtype, number, error)


def the_scan_is_ours() -> None:
    """Packed, on odd lengths, in both precisions; dt, A and D are float32 in the mixer too."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from hybridprune_megatron.ops.ssd import ssd_scan

    total, index = sum(LENGTHS), _index()
    shapes = ((total, HEADS, WIDTH), (total, GROUPS, STATE), (total, GROUPS, STATE))
    x, B, C = (_randn(*shape) for shape in shapes)
    dt = torch.nn.functional.softplus(_randn(total, HEADS) - 2)
    A, D = -torch.rand(HEADS, device="cuda") - 0.1, _randn(HEADS)

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        batched = [each.unsqueeze(0) for each in (x, dt, B, C)]
        seq_idx = index.unsqueeze(0)
        y: Any = mamba_chunk_scan_combined(*batched[:2], A, *batched[2:], CHUNK, D=D, seq_idx=seq_idx)
        return y.squeeze(0)

    for dtype in ALLOWED:
        _compared(
            "scan", (x, dt, A, B, C, D), dtype, theirs, lambda *inputs: ssd_scan(*inputs, index, CHUNK), (1, 2, 5)
        )


def the_gated_norm_is_ours() -> None:
    """Of z as a view of a wider tensor, as the mixer gives it."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    width, group = HEADS * WIDTH, HEADS * WIDTH // GROUPS
    values = (_randn(300, width), _randn(300, STRIDE), 1 + 0.1 * _randn(width))
    settings = {"eps": GATED_NORM_EPSILON, "group_size": group, "norm_before_gate": False}
    for dtype in ALLOWED:
        _compared(
            "gated norm",
            values,
            dtype,
            lambda y, wide, weight: rmsnorm_fn(y, weight, None, z=wide[:, :width], **settings),
            lambda y, wide, weight: gated_rms_norm(y, wide[:, :width], weight, group),
        )


def the_convolution_is_ours() -> None:
    """Channels last, stopped at sample boundaries."""
    from causal_conv1d import causal_conv1d_fn

    from hybridprune_megatron.ops.conv import causal_conv_silu

    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    values = (_randn(sum(LENGTHS), channels), 0.3 * _randn(channels, 4), _randn(channels))
    index = _index().unsqueeze(0)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        last = x.contiguous().unsqueeze(0).transpose(1, 2)
        return causal_conv1d_fn(last, weight, bias, seq_idx=index, activation="silu").transpose(1, 2).squeeze(0)

    for dtype in ALLOWED:
        _compared("convolution", values, dtype, theirs, lambda *inputs: causal_conv_silu(*inputs, list(LENGTHS)))


def a_long_view_is_addressed() -> None:
    """The gate of 100,000 tokens, whose last rows lie beyond 2^31 numbers, as the mixer hands it over."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    width, group = HEADS * WIDTH, HEADS * WIDTH // GROUPS
    assert LONG * STRIDE > OFFSET_LIMIT
    y = torch.randn(LONG, width, device="cuda", dtype=torch.bfloat16)
    z = torch.randn(LONG, STRIDE, device="cuda", dtype=torch.bfloat16)[:, :width]
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    settings = {"eps": GATED_NORM_EPSILON, "group_size": group, "norm_before_gate": False}
    found = rmsnorm_fn(addressable(y), weight, None, z=addressable(z), **settings)
    for rows in (slice(0, 64), slice(LONG - 64, LONG)):
        wanted = gated_rms_norm(y[rows].float(), z[rows].float(), weight.float(), group)
        error = float((found[rows].float() - wanted).norm() / wanted.norm())
        assert error < ALLOWED[torch.bfloat16], (rows, error)


CHECKS: tuple[Callable[[], None], ...] = (
    the_gated_norm_is_ours,
    a_long_view_is_addressed,
    the_scan_is_ours,
    the_convolution_is_ours,
)

if __name__ == "__main__":
    run_checks(CHECKS)
