"""The norms against their formulas, forward and gradient."""

import pytest
import torch

from hybridprune_megatron.ops.norm import gated_rms_norm, rms_norm


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def naive(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def test_rms_norm_equals_its_formula():
    # The epsilon is large enough to matter.
    x, weight = inputs((5, 1, 7), (7,))
    torch.testing.assert_close(rms_norm(x, weight, 0.3), naive(x, weight, 0.3))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 0.3), (x, weight))


@pytest.mark.parametrize("group_width", [3, 6])
def test_gated_norm_equals_its_formula(group_width):
    y, z, weight = inputs((5, 6), (5, 6), (6,))
    gated = (y * z * torch.sigmoid(z)).view(5, -1, group_width)
    expected = naive(gated, weight.view(-1, group_width), 1e-5).view(5, 6)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, group_width), expected)
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, group_width), (y, z, weight))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norms_of_bf16_are_taken_in_float32(weight_dtype):
    y, z = (tensor.detach().bfloat16().requires_grad_() for tensor in inputs((5, 6), (5, 6)))
    weight = inputs((6,))[0].detach().to(weight_dtype).requires_grad_()
    for norm, tensors in ((lambda y, w: rms_norm(y, w, 1e-5), (y, weight)), (gated, (y, z, weight))):
        out = norm(*tensors)
        exact = norm(*(tensor.float() for tensor in tensors))
        assert out.dtype == torch.bfloat16
        # Rounded once, at the end.
        assert torch.equal(out, exact.bfloat16())
        for gradient, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors):
            assert gradient.dtype == tensor.dtype


def gated(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated_rms_norm(y, z, weight, 3)
