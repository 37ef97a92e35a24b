"""Scores need memory that grows with the length, not with its square: peaks are counted at two lengths."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals
from hybridprune_megatron.method.smoothing import smoothed, with_frame

HEADS, KV_HEADS, WIDTH, GROUPS, STATE = 4, 2, 4, 2, 4
PATCHES, QUERY = 64, 64
SHORT, LONG = 2048, 8192
# Bytes that a token more may cost: a few numbers a head in float64. All query rows at once would be QUERY * HEADS * 4,
# a row of an L x L matrix SHORT * 4.
BYTES_PER_TOKEN = 64 * HEADS

Function = Callable[[TokenLayout, AttentionSignals, MambaSignals], object]


def peak_bytes(function: Function, num_visual: int) -> int:
    """Highest sum of what torch has allocated and not freed while the function runs."""
    frames = [Span(TokenKind.FRAME, PATCHES, 0, frame) for frame in range(num_visual // PATCHES)]
    layout = TokenLayout.from_samples([SampleLayout((*frames, Span(TokenKind.QUESTION, QUERY)))])
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(layout.num_tokens, *shape, generator=generator)

    attention = AttentionSignals.of(randn(HEADS, WIDTH), randn(KV_HEADS, WIDTH), layout)
    mamba = MambaSignals(randn(GROUPS, STATE), randn(GROUPS, STATE), randn(HEADS).exp(), -torch.ones(HEADS))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function(layout, attention, mamba)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak, "the profiler saw no allocation"
    return peak


def bytes_per_token(function: Function) -> float:
    return (peak_bytes(function, LONG) - peak_bytes(function, SHORT)) / (LONG - SHORT)


MAMBA = [
    {"mamba_decay": decay, "mamba_function": function}
    for decay in (False, True)
    for function in ("identity", "abs", "relu", "softmax")
]


@pytest.mark.parametrize("settings", MAMBA, ids=str)
def test_mamba_scores_are_linear(settings):
    scorer = SCORERS.build({"name": "query", "mamba_pooling": "max_heads", **settings})
    assert bytes_per_token(lambda layout, _, signals: scorer.score(signals, layout, 0)) < BYTES_PER_TOKEN


@pytest.mark.parametrize("causal", [True, False])
def test_attention_scores_are_linear(causal):
    scorer = SCORERS.build({"name": "query", "attention_causal": causal, "attention_pooling": "max"})
    assert bytes_per_token(lambda layout, signals, _: scorer.score(signals, layout, 0)) < BYTES_PER_TOKEN


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_scores_that_look_at_nothing_are_linear(name):
    scorer = SCORERS.build({"name": name})
    assert bytes_per_token(lambda layout, signals, _: scorer.score(signals, layout, 0)) < BYTES_PER_TOKEN


def test_smoothing_and_selection_are_linear():
    def run(layout: TokenLayout, *_: object) -> None:
        scores = with_frame(smoothed(torch.zeros(sum(layout.visual_counts)), layout, 2), layout, 0.5)
        select(scores, layout, [count // 3 for count in layout.visual_counts], min_per_frame=2)

    assert bytes_per_token(run) < BYTES_PER_TOKEN


def all_rows_at_once(layout: TokenLayout, attention: AttentionSignals, _: object) -> torch.Tensor:
    q, k = attention.q, attention.k.repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("the,jhe->thj", q, k).softmax(-1)[..., layout.visual_index].mean((0, 1))


def square(layout: TokenLayout, attention: AttentionSignals, _: object) -> torch.Tensor:
    matrix = (attention.k[:, 0] @ attention.k[:, 0].T).softmax(-1)
    return matrix[layout.query_index].mean(0)[layout.visual_index]


@pytest.mark.parametrize("planted", [all_rows_at_once, square])
def test_a_score_that_is_not_blocked_is_caught(planted):
    assert bytes_per_token(planted) > 2 * BYTES_PER_TOKEN
