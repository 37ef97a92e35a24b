"""The chunked scan and the convolution against token-by-token loops, forward and gradient, packed and odd."""

import pytest
import torch

from hybridprune_megatron.ops import conv, ssd_blocks
from hybridprune_megatron.ops.conv import causal_conv
from hybridprune_megatron.ops.ssd import ssd_final_states, ssd_scan, ssd_step

HEADS, WIDTH, GROUPS, STATE = 4, 3, 2, 5


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, B, C = randn(length, HEADS, WIDTH), randn(length, GROUPS, STATE), randn(length, GROUPS, STATE)
    dt, A, D = torch.nn.functional.softplus(randn(length, HEADS)), -randn(HEADS).exp(), randn(HEADS)
    return [x, dt, A, B, C, D]


def sample_index(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def naive_scan(x, dt, A, B, C, D, lengths):
    """The recurrence as it is written, one token at a time; also the last states."""
    outputs, states, start = [], [], 0
    for length in lengths:
        state = torch.zeros(1, HEADS, WIDTH, STATE, dtype=x.dtype)
        for i in range(start, start + length):
            y, state = ssd_step(x[i : i + 1], dt[i : i + 1], A, B[i : i + 1], C[i : i + 1], D, state)
            outputs.append(y)
        states.append(state)
        start += length
    return torch.cat(outputs), torch.cat(states)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("lengths", [(1,), (8,), (23,), (3, 1, 17, 9), (16, 16), (1, 1, 1)])
@pytest.mark.parametrize("chunk_size", [4, 8, 64])
def test_scan_equals_the_recurrence(lengths, chunk_size, native, monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", native)
    tensors = [tensor.float().requires_grad_() for tensor in inputs(sum(lengths))]
    index = sample_index(lengths)
    y = ssd_scan(*tensors, index, chunk_size)
    expected, states = naive_scan(*tensors, lengths)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((y * weight).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), tensors)
    for name, got, want in zip(["x", "dt", "A", "B", "C", "D"], gradients, expected_gradients):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    x, dt, A, B, _, _ = tensors
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    torch.testing.assert_close(ssd_final_states(x, dt, A, B, cu_seqlens, index), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(5,), (3, 1, 4), (7, 6), (14, 5, 1)])
@pytest.mark.parametrize("chunks_per_block", [1, 2])
def test_the_scan_s_own_backward_is_its_derivative(lengths, chunks_per_block, monkeypatch):
    """To float64 precision, over several blocks and a shorter last chunk."""
    monkeypatch.setattr(ssd_blocks, "_BLOCK_ELEMENTS", chunks_per_block * HEADS * 4 * 4)
    tensors = [tensor.requires_grad_() for tensor in inputs(sum(lengths))]
    assert torch.autograd.gradcheck(lambda *t: ssd_scan(*t, sample_index(lengths), 4), tensors, fast_mode=True)


def test_gradients_are_exact_where_the_skip_outweighs_the_state():
    """As at the start of training: what comes from the state is a ten-thousandth of D x, and not lost in it."""
    x, dt, A, B, C, D = inputs(50)
    exact = [x, dt * 0.02, A, B * 0.01, C * 0.01, D]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in exact]
        # Loss of the output's square: its gradient points along the output, so that nothing cancels by chance.
        loss = ssd_scan(*tensors, sample_index((30, 20)), 16).square().sum()
        gradients.append(torch.autograd.grad(loss, tensors))
    for got, want in zip(*gradients):
        assert (got - want).norm() < 1e-5 * want.norm()


def test_a_planted_leak_between_samples_is_seen():
    """The test above would notice states that cross samples: one joined sample gives another result."""
    tensors = [tensor.float() for tensor in inputs(12)]
    separate = ssd_scan(*tensors, sample_index((5, 7)), 4)
    joined = ssd_scan(*tensors, sample_index((12,)), 4)
    torch.testing.assert_close(separate[:5], joined[:5])
    assert (separate[5:] - joined[5:]).abs().max() > 1e-2


def test_a_step_of_zero_is_an_exact_skip():
    """dt = 0 neither writes nor decays: the other tokens do not notice that the token is there."""
    x, dt, A, B, C, D = (tensor.float() for tensor in inputs(9))
    dt[4] = 0.0
    keep = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    with_skip = ssd_scan(x, dt, A, B, C, D, sample_index((9,)), 4)[keep]
    without = ssd_scan(x[keep], dt[keep], A, B[keep], C[keep], D, sample_index((8,)), 4)
    torch.testing.assert_close(with_skip, without)


def test_long_decay_does_not_overflow():
    x, dt, A, B, C, D = (tensor.float() for tensor in inputs(300))
    y = ssd_scan(x, dt * 50, A, B, C, D, sample_index((300,)), 128)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("lengths", [(1,), (2, 3), (7, 1, 1, 12)])
def test_convolution_equals_its_sum(lengths):
    generator = torch.Generator().manual_seed(0)
    length, channels, width = sum(lengths), 6, 4
    x = torch.randn(length, channels, generator=generator, requires_grad=True)
    weight = torch.randn(channels, width, generator=generator, requires_grad=True)
    bias = torch.randn(channels, generator=generator, requires_grad=True)
    y = causal_conv(x, weight, bias, lengths)
    # Channels last in and out: whatever reads rows after it is ten times slower otherwise.
    assert y.is_contiguous()
    parts = []
    for sample in x.split(list(lengths)):
        padded = torch.nn.functional.pad(sample.T, (width - 1, 0))
        parts.append(torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=channels).T)
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), (x, weight, bias)),
        torch.autograd.grad(expected.square().sum(), (x, weight, bias)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_convolution_s_own_backward_is_its_derivative(monkeypatch):
    """To float64 precision, with sums over several blocks of rows."""
    monkeypatch.setattr(conv, "_BLOCK_ELEMENTS", 2 * 4)
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 4), (4, 3), (4,)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, (3, 1, 5)), tensors)
