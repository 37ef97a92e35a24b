"""Sums that do not depend on where in a tensor their numbers lie, so that equal tokens get equal scores, bitwise.

torch's reductions and matrix products choose the order of summation by all sizes of a tensor, and columns at its end
get another order than those before. Rounding then differs in the last bit, and ties no longer keep the earlier token.
"""

from __future__ import annotations

from torch import Tensor

#: Bits of a float64's significand.
_DOUBLE = 53


def summed(values: Tensor, dim: int) -> Tensor:
    """Sum over one dimension, of at least one entry, by halves: the order depends on its length alone."""
    while (length := values.shape[dim]) > 1:
        half = length // 2
        added = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if length % 2:
            added.narrow(dim, 0, 1).add_(values.narrow(dim, length - 1, 1))
        values = added
    return values.squeeze(dim)


def averaged(values: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, of at least one entry; see ``summed``."""
    return summed(values, dim) / values.shape[dim]


def on_grid(values: Tensor) -> Tensor:
    """float64 vectors whose dot products have no rounding error, whatever computes them in whatever order.

    Every vector is rounded to multiples of a power of two so large that float64 holds any sum of N products of two
    vectors' entries. For N = 128 an entry is off by at most 2^-23 of the vector's largest one.

    Args:
        values: [..., N] float32 or bfloat16 vectors.
    """
    width = values.shape[-1]
    # Entries are whole numbers of up to this many bits, times a power of two; the sum takes log2(N) more than products.
    bits = (_DOUBLE - (width - 1).bit_length()) // 2
    # Adding a number this large, in float64, leaves steps of at least 2^-bits of the largest entry.
    large = values.abs().amax(-1, keepdim=True).double() * 2.0 ** (_DOUBLE - bits)
    return (values + large).sub_(large)
