"""The native convolution and norms of the CPU: what they add to tests/ops, which run both ways."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.ops import native as switch
from hybridprune_megatron.ops.conv import causal_conv, causal_conv_silu
from hybridprune_megatron.ops.native import native
from hybridprune_megatron.ops.norm import gated_rms_norm, rms_norm


def rows(length: int, width: int, seed: int = 0) -> torch.Tensor:
    """A part of wider rows, as the mixer cuts it from its input projection."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, width + 5, generator=generator)[:, 3 : 3 + width].requires_grad_()


def both(run, monkeypatch) -> list[list[torch.Tensor]]:
    """Outputs and gradients in plain torch and natively."""
    found = []
    for setting in ("0", "1"):
        monkeypatch.setenv("HYBRIDPRUNE_KERNELS", setting)
        found.append(run())
    return found


def with_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("channels", [1, 16, 77])
@pytest.mark.parametrize("lengths", [(1,), (700,), (2, 0, 1, 1, 300, 3)])
def test_convolution_equals_plain_torch(lengths, channels, taps, monkeypatch):
    x, weight, bias = rows(sum(lengths), channels), rows(channels, taps, 1), rows(1, channels, 2)
    plain, found = both(
        lambda: with_gradients(lambda x, w, b: causal_conv_silu(x, w, b[0], lengths), x, weight, bias), monkeypatch
    )
    with torch.no_grad():
        plain.append(causal_conv(x, weight, bias[0], lengths))
        found += both(lambda: causal_conv_silu(x, weight, bias[0], lengths), monkeypatch)[1:]
    assert torch.equal(found[0], found[-1]), "recomputation would see other numbers"
    plain[-1] = torch.nn.functional.silu(plain[-1])
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "width"), [(1, 1), (3, 7), (8, 160)])
@pytest.mark.parametrize("length", [1, 513])
def test_norms_equal_plain_torch(length, groups, width, monkeypatch):
    y, z = rows(length, groups * width), rows(length, groups * width, 1)
    weight = rows(1, groups * width, 2)
    for function, inputs in (
        (lambda y, w: rms_norm(y, w[0], 1e-5), (y, weight)),
        (lambda y, z, w: gated_rms_norm(y, z, w[0], width), (y, z, weight)),
    ):
        plain, found = both(lambda f=function, i=inputs: with_gradients(f, *i), monkeypatch)
        torch.testing.assert_close(found, plain, rtol=2e-5, atol=2e-5)


def test_large_gates_neither_overflow_nor_vanish(monkeypatch):
    x = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0]])
    one, zero = torch.ones(7, 1), torch.zeros(7)
    with torch.no_grad():
        plain, found = both(lambda: causal_conv_silu(x, one, zero, [1]), monkeypatch)
    torch.testing.assert_close(found, plain)


def test_all_layers_of_a_prefill_use_them(monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "1")
    assert switch.native_on_cpu(torch.zeros(1)) is torch.ops.hybridprune
    # Others' kernels, and a compiler, do better elsewhere.
    assert switch.native_on_cpu(torch.zeros(1).bfloat16()) is None
    assert switch.native_on_cpu(torch.zeros(1, device="meta")) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert switch.native_on_cpu(torch.zeros(1)) is None


def test_opcheck():
    x, offsets = rows(6, 8).detach(), torch.tensor([0, 2, 6])
    ops = native(x)
    torch.library.opcheck(ops.causal_conv.default, (x, rows(8, 4).detach(), x[0].contiguous(), offsets, True))
    torch.library.opcheck(ops.rms_norm.default, (x, x[0].contiguous(), 1e-5))
    torch.library.opcheck(ops.gated_rms_norm.default, (x, x + 1, x[0].contiguous(), 4, 1e-5))


def test_errors_are_one_line():
    x, weight, offsets = torch.zeros(6, 8), torch.zeros(8, 4), torch.tensor([0, 2, 6])
    ops, one = native(x), torch.ones(8)
    for run, message in (
        (lambda: ops.causal_conv(x.bfloat16(), weight, one, offsets, True), "x is .*: expected float32"),
        (lambda: ops.causal_conv(x, weight[:7], one, offsets, True), "weight is .*: expected float32 .8, taps."),
        (lambda: ops.causal_conv(x, weight, one[:7], offsets, True), "bias is .*: expected float32 .8."),
        (lambda: ops.causal_conv(x, weight, one, offsets[:2], True), "offsets goes from 0 to 2: expected 0 to 6"),
        (lambda: ops.rms_norm(x, one[:3], 1e-5), "weight is .*: expected float32 .8."),
        (lambda: ops.gated_rms_norm(x, x[:5], one, 4, 1e-5), "y is .* and z .*: expected the same"),
        (lambda: ops.gated_rms_norm(x, x, one, 3, 1e-5), "group_width=3: expected a divisor of 8"),
    ):
        with pytest.raises(RuntimeError, match=message) as error:
            run()
        assert "\n" not in str(error.value)
