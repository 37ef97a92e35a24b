"""The native scan of the CPU: what it adds to tests/ops/test_ssd.py, which runs both ways."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.ops.native import native
from hybridprune_megatron.ops.ssd import ssd_scan


def inputs(length: int, groups: int, heads: int, width: int, state: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    randn = [torch.randn(length, groups, *shape, generator=generator) for shape in ((heads, width), (state,), (state,))]
    dt = torch.rand(length, groups, heads, generator=generator) * 0.3
    # Up to e^-2 a step, so that a chunk's decays reach below what float32 can hold.
    A = -torch.rand(groups, heads, generator=generator) * 8 - 0.1
    D = torch.randn(groups, heads, generator=generator)
    return [randn[0], dt, A, randn[1], randn[2], D]


@pytest.mark.parametrize(("groups", "heads", "width", "state"), [(1, 1, 1, 1), (2, 3, 5, 7), (8, 16, 80, 128)])
@pytest.mark.parametrize("lengths", [(1,), (128,), (129,), (1, 63, 128, 109), (5, 250)])
def test_it_equals_plain_torch(lengths, groups, heads, width, state, monkeypatch):
    x, dt, A, B, C, D = inputs(sum(lengths), groups, heads, width, state)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    flat = (x.flatten(1, 2), dt.flatten(1), A.flatten(), B, C, D.flatten(), index, 128)
    found = {}
    for setting in ("0", "1"):
        monkeypatch.setenv("HYBRIDPRUNE_KERNELS", setting)
        found[setting] = ssd_scan(*flat)
    assert not torch.equal(found["0"], found["1"]) or found["0"].numel() < 10_000, "both ran the same code"
    torch.testing.assert_close(found["1"], found["0"], rtol=1e-4, atol=1e-4)
    # As a convolution leaves them: parts of one matrix.
    beside = torch.cat([part.flatten(1) for part in (flat[0], B, C)], 1).split(
        [flat[0][0].numel(), B[0].numel(), C[0].numel()], 1
    )
    parts = [part.view(like.shape) for part, like in zip(beside, (flat[0], B, C))]
    assert torch.equal(ssd_scan(parts[0], *flat[1:3], *parts[1:], *flat[5:]), found["1"])


def test_opcheck():
    tensors = inputs(37, 2, 3, 5, 7)
    index = torch.repeat_interleave(torch.arange(2), torch.tensor([20, 17])).int()
    torch.library.opcheck(native(tensors[0]).ssd_scan.default, (*tensors, index, 16))


def test_errors_are_one_line():
    x, dt, A, B, C, D = inputs(9, 2, 3, 5, 7)
    index, scan = torch.zeros(9, dtype=torch.int32), native(x).ssd_scan
    for arguments, message in (
        ((x, dt[:8], A, B, C, D, index, 4), "dt is .* expected the first three of x"),
        ((x, dt, A, B, C[:, :1], D, index, 4), "B is .* and C .* expected"),
        ((x, dt, A, B, C, D, index[:5], 4), "sample_index is .* expected"),
        ((x, dt, A, B, C, D, index, 0), "chunk=0: expected 1 or more"),
        ((x.bfloat16(), dt, A, B, C, D, index, 4), "takes float32, not"),
    ):
        with pytest.raises(RuntimeError, match=message):
            scan(*arguments)
