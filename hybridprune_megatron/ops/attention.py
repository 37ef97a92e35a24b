"""Causal attention of a packed sequence, plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
    outputs = []
    for q, k, v in zip(*(tensor.split(list(sample_lengths)) for tensor in (query, key, value))):
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            is_causal=True,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs).flatten(1)
