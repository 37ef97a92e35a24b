"""What the kernels of mamba_ssm are given: they address numbers with 32 bits."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.models.mamba_ops import OFFSET_LIMIT, addressable

# Of the 12B model on one tensor rank: z, of 10,240 channels, is a view of the input projection's 22,656.
_WIDTH, _STRIDE = 10_240, 22_656


def view(length: int) -> torch.Tensor:
    """Rows of z without their memory."""
    return torch.empty(length, _STRIDE, dtype=torch.bfloat16, device="meta")[:, :_WIDTH]


def test_rows_within_reach_are_not_copied() -> None:
    z = view(94_786)
    assert addressable(z) is z
    assert (len(z) - 1) * z.stride(0) < OFFSET_LIMIT


def test_rows_beyond_it_are_put_side_by_side() -> None:
    z = addressable(view(131_072))
    assert z.stride() == (_WIDTH, 1)
    heads = torch.empty(131_072, 22_656, device="meta")[:, :_WIDTH].unflatten(1, (128, 80))
    assert addressable(heads).stride() == (_WIDTH, 80, 1)
    small = torch.arange(12.0).view(3, 4)[:, 1:3]
    assert addressable(small) is small


def test_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^262144 tokens of 10240 channels per rank: .*; raise parallel.tensor or"):
        addressable(view(262_144))
