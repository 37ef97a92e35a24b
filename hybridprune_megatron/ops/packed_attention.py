"""Causal attention of a packed sequence, plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right


def packed_attention(query: Tensor, key: Tensor, value: Tensor, sample_lengths: Sequence[int]) -> Tensor:
    """Attends causally within samples with torch's scaled_dot_product_attention, one sample at a time.

    Args:
        query: [L, H, E].
        key: [L, K, E]; head h reads key-value head h * K // H.
        value: [L, K, E].
        sample_lengths: lengths of the samples (host), sum L.

    Returns:
        [L, H * E].
    """
    return shared_attention(query, key, value, [slice(0, len(key))], [0, *accumulate(sample_lengths)])


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[slice], sample_starts: Sequence[int]
) -> Tensor:
    """``packed_attention`` for some of the queries and all keys.

    Args:
        query: [l, H, E] of the tokens in ``parts``, one after another.
        key: [L, K, E].
        value: [L, K, E].
        parts: runs of tokens (host).
        sample_starts: S + 1 offsets of the samples (host).

    Returns:
        [l, H * E].
    """
    outputs, row = [query[:0]], 0
    for part in parts:
        for first, last in pairwise(sample_starts):
            start, stop = max(first, part.start), min(last, part.stop)
            if start < stop:
                # Its queries see the sample up to themselves.
                outputs.append(_attend(query[row : row + stop - start], key[first:stop], value[first:stop]))
                row += stop - start
    return torch.cat(outputs).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[l, H, E] of l queries and the L keys that end with theirs."""
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    aligned = query.shape[2] == key.shape[2]
    mask = None if aligned else causal_lower_right(query.shape[2], key.shape[2])
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=aligned, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)
