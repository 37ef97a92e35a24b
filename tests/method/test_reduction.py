"""The whole step, before the model and inside: counts, budget, and what a merger leaves, over a published depth."""

from __future__ import annotations

from math import floor

import pytest
import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.merge import take_merged
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.score_output import OutputNormScorer
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.method.settings import Select

NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
TOKENS, WIDTH = 6, 3


def layout_of(*frames: int) -> TokenLayout:
    """One sample a number of frames, a text before each frame."""
    samples = []
    for count in frames:
        spans = [Span(TokenKind.TEXT, 2)]
        for frame in range(count):
            spans += [Span(TokenKind.TEXT, 1), Span(TokenKind.FRAME, TOKENS, 0, frame)]
        samples.append(SampleLayout((*spans, Span(TokenKind.QUESTION, 3))))
    return TokenLayout.from_samples(samples)


def through(layout: TokenLayout, multiple_of: int = 1, **settings) -> list[TokenLayout]:
    """The layout that enters every layer, with random scores and hidden states."""
    reduction = ReductionConfig.of(settings).policy(NANO_12B)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(layout.num_tokens, 1, WIDTH, generator=generator)
    pixels = torch.randint(0, 256, (len(layout.frame_videos), 3, 4, 4), dtype=torch.uint8, generator=generator)
    assert reduction is not None
    dropping = ReductionPass.of(reduction, layout, multiple_of)
    hidden, layout = dropping.enter(hidden, layout, pixels)

    def run(layer: int, hidden: torch.Tensor, layout: TokenLayout, scorer: Scorer | None):
        assert len(hidden) == layout.num_tokens
        asked = dropping.drops_after(layer) and reduction.scorer is not None
        assert (scorer is not None) == asked
        return hidden, torch.rand(len(layout.visual_index), generator=generator)

    entered: list[TokenLayout] = []
    dropping.walk(range(len(NANO_12B)), hidden, layout, run, trace=entered)
    return entered


@pytest.mark.parametrize("dropped", ["discard", "merge"])
@pytest.mark.parametrize("front", ["evs", "tome", "random", "uniform"])
@pytest.mark.parametrize("scorer", ["query", "utrc"])
def test_front_and_inside_share_one_budget(front, scorer, dropped):
    layout = layout_of(40, 25)
    front, select = {"name": front, "retention": 0.5}, {"dropped": dropped}
    entered = through(layout, score=scorer, budget=0.25, front=front, select=select)
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
    reduction = Reduction(QueryScorer(), (1.0, 4 / 18), Select(**settings))
    dropping = ReductionPass.of(reduction, layout)
    hidden, left = dropping.step(0, torch.arange(layout.num_tokens).unsqueeze(1), layout, scores)
    assert list(zip(left.visual_frame.tolist(), left.visual_patch.tolist())) == kept
    assert hidden.flatten().tolist() == left.origin.tolist()


@pytest.mark.parametrize("share", [0.1, 0.37, 0.75])
def test_evs_alone_passes_on_what_its_formula_says(share):
    """max(tokens per frame, floor(all * share)) in every layer."""
    layout = layout_of(13, 1, 2)
    for each in through(layout, budget=share, front={"name": "evs", "retention": share}):
        assert list(each.visual_counts) == [max(TOKENS, floor(count * share)) for count in layout.visual_counts]


@pytest.mark.parametrize("scorer", ["query", "utrc"])
def test_dropped_tokens_are_discarded_or_merged_as_asked(scorer):
    layout, counts = layout_of(3, 2), (7, 5)
    hidden = torch.randn(layout.num_tokens, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    scores = torch.rand(30, generator=torch.Generator().manual_seed(2))
    partner, ranked = None, scores
    if scorer == "utrc":
        ranking = OutputNormScorer().rank(hidden.flatten(1), layout, counts)
        partner, ranked, scores = ranking.partner, ranking.scores, None
    plan = select(ranked, layout, counts)
    expected = {"discard": plan.take(hidden), "merge": take_merged(hidden, layout, plan, partner)}
    assert not torch.equal(*expected.values())
    for dropped, rows in expected.items():
        reduction = Reduction(SCORERS.build(scorer), (1.0, 0.4), Select(dropped=dropped))
        left, after = ReductionPass(reduction, (layout.visual_counts, counts)).step(0, hidden, layout, scores)
        assert torch.equal(left, rows)
        assert torch.equal(after.origin, plan.kept)


def test_packed_lengths_divide_after_a_front():
    layout = layout_of(12, 6, 1)
    assert layout.num_tokens == 148
    entered = through(layout, 4, score="utrc", budget=0.3, front={"name": "evs", "retention": 0.6})
    assert entered[0].num_tokens < 148
    assert all(each.num_tokens % 4 == 0 for each in entered)


def test_a_step_filter_alone_is_a_reduction_that_drops_nothing():
    layout = layout_of(4)
    assert ReductionConfig.of({"budget": 1.0}).policy(NANO_12B) is None
    entered = through(layout, budget=1.0, dt_filter=0.25)
    assert {each.visual_counts for each in entered} == {(24,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "utrc", "select": {"smoothing_frames": 1}}, "set reduction.select.smoothing_frames=0"),
        ({"score": "utrc", "select": {"frame_share": 0.5}}, "set reduction.select.frame_share=0"),
        ({"score": "utrc", "select": {"min_tokens_per_frame": 2}}, "set reduction.select.min_tokens_per_frame=0"),
        ({"dt_filter": 1.5}, "reduction.dt_filter=1.5: must be above 0 and at most 1"),
        ({"dt_filter": 0.0}, "reduction.dt_filter=0.0: must be above 0 and at most 1"),
        ({"front": "fps"}, "reduction.front=fps: allowed are evs, evs_pixels, none"),
        ({"front": "evs"}, "reduction.front.retention=1.0: reduction.front=evs passes on less than all"),
        ({"front": {"name": "none", "retention": 0.5}}, "reduction.front.retention=0.5: .*passes on everything"),
        ({"select": {"dropped": "averaged"}}, "reduction.select.dropped=averaged"),
        ({"selct": {}}, r"reduction.selct={}: .*did you mean reduction.select\?"),
        ({"budget": "half"}, "reduction.budget=half: must be a number"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ReductionConfig.of({"budget": 0.5, **settings})
    assert "\n" not in str(error.value)
