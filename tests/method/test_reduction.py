"""The whole step, in front and inside: counts, budget, and what a merger leaves, over a published depth."""

from __future__ import annotations

from math import floor

import pytest
import torch

from hybridprune_megatron.config.checks import ConfigError
from hybridprune_megatron.config.reduction_schema import ReductionConfig, resolved_retention
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.merge import take_merged
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.reduction import Reduction, counts_after
from hybridprune_megatron.method.score_output import OutputNormScorer

NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
TOKENS, WIDTH = 6, 3


def layout_of(*frames: int) -> TokenLayout:
    """One sample a number of frames, a text in front of each frame."""
    samples = []
    for count in frames:
        spans = [Span(TokenKind.TEXT, 2)]
        for frame in range(count):
            spans += [Span(TokenKind.TEXT, 1), Span(TokenKind.FRAME, TOKENS, 0, frame)]
        samples.append(SampleLayout((*spans, Span(TokenKind.QUESTION, 3))))
    return TokenLayout.from_samples(samples)


def through(layout: TokenLayout, multiple_of: int = 1, **settings) -> list[TokenLayout]:
    """The layout that enters every layer, with random scores and hidden states."""
    config = ReductionConfig(**settings)
    reduction = Reduction.of(vars(config), resolved_retention(config, NANO_12B))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(layout.num_tokens, 1, WIDTH, generator=generator)
    pixels = torch.randint(0, 256, (len(layout.frame_videos), 3, 4, 4), dtype=torch.uint8, generator=generator)
    assert reduction is not None
    hidden, layout = reduction.in_front(hidden, layout, pixels, multiple_of)
    by_layer = reduction.counts_by_layer(layout, multiple_of)
    entered = []
    for layer in range(len(NANO_12B)):
        entered.append(layout)
        assert len(hidden) == layout.num_tokens
        counts = counts_after(layer, layout, by_layer)
        if counts != layout.visual_counts:
            scores = torch.rand(len(layout.visual_index), generator=generator)
            hidden, layout = reduction.drop(hidden, layout, counts, scores)
    return entered


@pytest.mark.parametrize("dropped", ["discard", "merge"])
@pytest.mark.parametrize("front", ["evs", "tome", "random", "uniform"])
@pytest.mark.parametrize("scorer", ["query", "utrc"])
def test_front_and_inside_share_one_budget(front, scorer, dropped):
    layout = layout_of(40, 25)
    entered = through(layout, scorer=scorer, budget=0.25, front=front, front_retention=0.5, dropped=dropped)
    for sample, original in enumerate(layout.visual_counts):
        counts = [each.visual_counts[sample] for each in entered]
        assert counts[0] in (original // 2, original // 2 + 1)
        mean = sum(counts) / len(counts) / original
        assert 0.25 - 1 / original < mean <= 0.25
        assert counts[-1] < counts[0] / 2, "inside drops too"


KEPT = {
    "plain": ({}, [(0, 0), (0, 5), (1, 2), (1, 5)]),
    # Means over a frame and its neighbours: patch 5 has 8.5, 5.7 and 4.5, patch 2 has 5 in the last frame.
    "smoothed": ({"smoothing_frames": 1}, [(0, 0), (0, 5), (1, 5), (2, 2)]),
    "every frame": ({"min_tokens_per_frame": 1}, [(0, 0), (0, 5), (1, 5), (2, 2)]),
    "both": ({"smoothing_frames": 2, "min_tokens_per_frame": 1}, [(0, 2), (0, 5), (1, 5), (2, 5)]),
}


@pytest.mark.parametrize(("settings", "kept"), KEPT.values(), ids=KEPT)
def test_scores_are_smoothed_and_every_frame_keeps_its_share(settings, kept):
    layout = layout_of(3)
    scores = torch.tensor([[9, 0, 0, 0, 0, 8], [0, 0, 5, 0, 0, 9], [0, 0, 5, 0, 1, 0]], dtype=torch.float32).flatten()
    reduction = Reduction.of({"scorer": "query", **settings}, (1.0, 4 / 18))
    assert reduction is not None
    counts = reduction.counts_by_layer(layout)[1]
    hidden, left = reduction.drop(torch.arange(layout.num_tokens).unsqueeze(1), layout, counts, scores)
    assert list(zip(left.visual_frame.tolist(), left.visual_patch.tolist())) == kept
    assert hidden.flatten().tolist() == left.origin.tolist()


@pytest.mark.parametrize("share", [0.1, 0.37, 0.75])
def test_evs_alone_hands_on_what_its_formula_says(share):
    """max(tokens per frame, floor(all * share)) in every layer."""
    layout = layout_of(13, 1, 2)
    for each in through(layout, scorer="query", budget=share, front="evs", front_retention=share):
        assert list(each.visual_counts) == [max(TOKENS, floor(count * share)) for count in layout.visual_counts]


@pytest.mark.parametrize("scorer", ["query", "utrc"])
def test_dropped_tokens_are_discarded_or_merged_as_asked(scorer):
    layout, counts = layout_of(3, 2), (7, 5)
    hidden = torch.randn(layout.num_tokens, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    scores = torch.rand(30, generator=torch.Generator().manual_seed(2))
    partner, ranked = None, scores
    if scorer == "utrc":
        ranking = OutputNormScorer().output(hidden.flatten(1), layout, counts)
        partner, ranked, scores = ranking.partner, ranking.scores, None
    plan = select(ranked, layout, counts)
    expected = {"discard": plan.take(hidden), "merge": take_merged(hidden, layout, plan, partner)}
    assert not torch.equal(*expected.values())
    for dropped, rows in expected.items():
        reduction = Reduction.of({"scorer": scorer, "dropped": dropped}, (1.0, 0.4))
        left, after = reduction.drop(hidden, layout, counts, scores)
        assert torch.equal(left, rows)
        assert torch.equal(after.origin, plan.kept)


def test_packed_lengths_divide_behind_a_front():
    layout = layout_of(12, 6, 1)
    assert layout.num_tokens == 148
    entered = through(layout, 4, scorer="utrc", budget=0.3, front="evs", front_retention=0.6)
    assert entered[0].num_tokens < 148
    assert all(each.num_tokens % 4 == 0 for each in entered)


def test_a_step_filter_alone_is_a_reduction_that_drops_nothing():
    layout = layout_of(4)
    assert Reduction.of({"scorer": "query"}, (1.0,) * len(NANO_12B)) is None
    entered = through(layout, scorer="query", budget=1.0, dt_filter=0.25)
    assert {each.visual_counts for each in entered} == {(24,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "utrc", "smoothing_frames": 1}, "set reduction.smoothing_frames=0"),
        ({"scorer": "utrc", "frame_share": 0.5}, "set reduction.frame_share=0"),
        ({"scorer": "utrc", "min_tokens_per_frame": 2}, "set reduction.min_tokens_per_frame=0"),
        ({"scorer": "query", "dt_filter": 1.5}, "reduction.dt_filter=1.5: must be above 0 and at most 1"),
        ({"scorer": "query", "dt_filter": 0.0}, "reduction.dt_filter=0.0: must be above 0 and at most 1"),
        ({"scorer": "query", "front": "fps"}, "reduction.front='?fps"),
        ({"scorer": "query", "dropped": "averaged"}, "reduction.dropped='?averaged"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ReductionConfig(budget=0.5, **settings)
    assert "\n" not in str(error.value)
