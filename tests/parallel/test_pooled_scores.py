"""Scores that ranks pool over their heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.models.packed import pack_for_layer
from hybridprune_megatron.models.stack import _over_heads
from tests.parallel.run import own_device
from tests.worlds import run_world

#: Different tokens, and how often each of them comes.
KINDS, TIMES = 64, 63


def _pooled() -> dict[str, tuple[list[float], list[list[float]]]]:
    """By pooling: this rank's score of every kind, and the pooled ones [TIMES, KINDS]."""
    device = own_device()
    spans = (Span(TokenKind.FRAME, KINDS * TIMES, 0, 0), Span(TokenKind.QUESTION, 1))
    packing = pack_for_layer(TokenLayout.from_samples([SampleLayout(spans)]), None, None, None)
    own = torch.randn(KINDS, generator=torch.Generator().manual_seed(dist.get_rank()))
    found = {}
    for pooling in ("mean", "max"):
        packing.scores, packing.pooling = own.to(device).repeat(TIMES), pooling
        scores = _over_heads(packing, dist.group.WORLD)
        assert scores is not None
        assert scores.dtype == torch.float32
        found[pooling] = own.tolist(), scores.unflatten(0, (TIMES, KINDS)).tolist()
    return found


def check_pooled(results: list[Any]) -> None:
    """The pooled scores are those of all ranks, and equal for equal tokens."""
    for pooling, reduced in (("mean", torch.Tensor.mean), ("max", torch.Tensor.amax)):
        expected = reduced(torch.tensor([each[pooling][0] for each in results]), 0)
        first = results[0][pooling][1][0]
        torch.testing.assert_close(torch.tensor(first), expected)
        for each in results:
            assert all(scores == first for scores in each[pooling][1]), pooling


def test_equal_tokens_keep_equal_scores_wherever_a_ring_adds_them_up() -> None:
    check_pooled(run_world(3, _pooled))
