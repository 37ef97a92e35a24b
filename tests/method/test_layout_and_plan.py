"""Layouts and plans: what moves together, and what never moves."""

import pytest
import torch

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.smoothing import smoothed, with_frame

TEXT, FRAME, QUESTION, ANSWER = TokenKind.TEXT, TokenKind.FRAME, TokenKind.QUESTION, TokenKind.ANSWER


def two_samples() -> list[SampleLayout]:
    """Two videos around text in the first sample, question before the video in the second."""
    first = SampleLayout(
        (
            Span(TEXT, 2),
            Span(FRAME, 3, video=0, frame=0),
            Span(TEXT, 1),
            Span(FRAME, 2, video=1, frame=0),
            Span(QUESTION, 2),
            Span(ANSWER, 1),
        )
    )
    return [first, SampleLayout((Span(QUESTION, 1), Span(FRAME, 4, video=0, frame=0), Span(ANSWER, 2)))]


def test_layout_says_where_everything_is():
    layout = TokenLayout.from_samples(two_samples())
    assert layout.sample_lengths == (11, 7)
    assert layout.visual_counts == (5, 4)
    assert layout.visual_index.tolist() == [2, 3, 4, 6, 7, 12, 13, 14, 15]
    assert layout.query_index.tolist() == [8, 9, 11]
    assert layout.cu_seqlens.tolist() == [0, 11, 18]
    assert layout.position.tolist() == [*range(11), *range(7)]


def test_a_layout_moves_whole_to_another_device():
    layout = TokenLayout.from_samples(two_samples())
    moved = layout.to("meta")
    devices = {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)}
    assert devices == {"meta"}
    assert (moved.sample_lengths, moved.frame_videos) == (layout.sample_lengths, layout.frame_videos)


def test_frames_are_counted_in_time_and_patches_within_them():
    """Videos out of order, a frame in two parts, and frames of different sizes."""
    sample = SampleLayout(
        (
            Span(FRAME, 2, video=1, frame=0),
            Span(FRAME, 1, video=0, frame=1),
            Span(QUESTION, 1),
            Span(FRAME, 3, video=0, frame=0),
            Span(FRAME, 2, video=0, frame=1),
        )
    )
    layout = TokenLayout.from_samples([sample, two_samples()[1]])
    assert layout.visual_frame.tolist() == [2, 2, 1, 0, 0, 0, 1, 1, 3, 3, 3, 3]
    assert layout.visual_patch.tolist() == [0, 1, 0, 0, 1, 2, 1, 2, 0, 1, 2, 3]
    assert layout.frame_videos == (0, 0, 1, 2)
    assert layout.patches_per_frame == 4
    assert sample.frames_per_video() == [2, 1]
    # A reduction keeps this knowledge, whatever it drops.
    after = select(torch.arange(12.0), layout, (3, 1)).layout
    assert after.visual_frame.tolist() == [0, 1, 1, 3]
    assert after.visual_patch.tolist() == [2, 1, 2, 3]
    assert (after.frame_videos, after.patches_per_frame) == (layout.frame_videos, 4)
    assert after.original_visual_counts == (8, 4)


def test_spans_from_kinds_round_trip():
    for sample in two_samples():
        assert SampleLayout.from_kinds(sample.kinds(), None, sample.frames_per_video()) == sample
    frames = SampleLayout.from_kinds([1] * 6, tokens_per_frame=2)
    assert [span.frame for span in frames.spans] == [0, 1, 2]
    with pytest.raises(ValueError, match="5 visual tokens in a row: expected a multiple of 2"):
        SampleLayout.from_kinds([1] * 5, tokens_per_frame=2)
    two_videos = SampleLayout.from_kinds([1] * 6, tokens_per_frame=2, frames_per_video=[1, 2, 0])
    assert [(span.video, span.frame) for span in two_videos.spans] == [(0, 0), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"frames_per_video=\[1, 1\]: the sample has 3 frames"):
        SampleLayout.from_kinds([1] * 6, tokens_per_frame=2, frames_per_video=[1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((TEXT, 0), "has at least one"), ((FRAME, 2), "exactly FRAME spans"), ((TEXT, 2, 0, 0), "exactly FRAME spans")],
)
def test_impossible_spans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Span(*arguments)


def test_select_keeps_order_text_and_the_best_of_every_sample():
    layout = TokenLayout.from_samples(two_samples())
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 5.0, 7.0, 6.0, 8.0])
    plan = select(scores, layout, (2, 1))
    assert plan.kept.tolist() == [0, 1, 3, 5, 6, 8, 9, 10, 11, 15, 16, 17]
    after = plan.layout
    assert after.sample_lengths == (8, 4)
    assert after.visual_index.tolist() == [2, 4, 9]
    assert after.query_index.tolist() == [5, 6, 8]
    assert after.cu_seqlens.tolist() == [0, 8, 12]
    # Whatever is taken with the plan agrees with what the layout says.
    kinds = torch.tensor([kind for sample in two_samples() for kind in sample.kinds()])
    cut = plan.take(kinds)
    assert torch.nonzero(cut == FRAME).flatten().tolist() == after.visual_index.tolist()
    assert torch.nonzero(cut == QUESTION).flatten().tolist() == after.query_index.tolist()
    assert after.origin.tolist() == plan.kept.tolist()
    assert after.position.tolist() == plan.take(layout.position).tolist()


def test_two_reductions_compose():
    layout = TokenLayout.from_samples(two_samples())
    generator = torch.Generator().manual_seed(0)
    first = select(torch.rand(9, generator=generator), layout, (4, 3))
    second = select(torch.rand(7, generator=generator), first.layout, (2, 0))
    rows = torch.arange(18)
    assert second.take(first.take(rows)).tolist() == second.layout.origin.tolist()
    assert second.layout.visual_counts == (2, 0)


def test_ties_keep_the_earlier_token():
    layout = TokenLayout.from_samples(two_samples())
    assert select(torch.zeros(9), layout, (2, 1)).layout.origin[2:4].tolist() == [2, 3]


def test_keeping_everything_changes_nothing():
    layout = TokenLayout.from_samples(two_samples())
    plan = select(torch.rand(9), layout, layout.visual_counts)
    assert plan.kept.tolist() == list(range(18))


def test_gradient_reaches_exactly_the_kept_rows():
    layout = TokenLayout.from_samples(two_samples())
    plan = select(torch.arange(9.0), layout, (1, 1))
    hidden = torch.randn(18, 1, 3, requires_grad=True)
    plan.take(hidden).sum().backward()
    touched = hidden.grad.abs().sum((1, 2)) > 0
    assert torch.nonzero(touched).flatten().tolist() == plan.kept.tolist()


def test_impossible_counts_are_refused():
    layout = TokenLayout.from_samples(two_samples())
    with pytest.raises(ValueError, match="sample 1 is to keep 5 visual tokens: it has 4"):
        select(torch.zeros(9), layout, (1, 5))
    with pytest.raises(ValueError, match="9 visual tokens"):
        select(torch.zeros(8), layout, (1, 1))


def videos(*frames_per_video: int, patches: int) -> SampleLayout:
    """Videos with text between them, then a question."""
    spans = []
    for video, frames in enumerate(frames_per_video):
        spans += [Span(FRAME, patches, video, frame) for frame in range(frames)] + [Span(TEXT, 1)]
    return SampleLayout((*spans, Span(QUESTION, 2)))


def naive_keep(scores: list[float], frames: list[int], count: int, floor: int) -> list[int]:
    """Rounds over the frames first, the best of every frame in each, then the best of all."""
    left, kept = list(range(len(scores))), []
    for _ in range(floor):
        best = [
            max((i for i in left if frames[i] == frame), key=lambda i: (scores[i], -i), default=None)
            for frame in sorted(set(frames))
        ]
        taken = sorted((i for i in best if i is not None), key=lambda i: (-scores[i], i))
        kept += taken
        left = [i for i in left if i not in taken]
    kept += sorted(left, key=lambda i: (-scores[i], i))
    return sorted(kept[:count])


@pytest.mark.parametrize("floor", [0, 1, 2, 9])
def test_every_frame_keeps_its_best_while_the_count_allows(floor):
    generator = torch.Generator().manual_seed(floor)
    layout = TokenLayout.from_samples([videos(3, 2, patches=5), videos(1, patches=5), videos(4, patches=5)])
    # Ties included; and twice, so that frames have lost tokens before.
    for counts in [(19, 5, 13), (12, 5, 6), (7, 2, 6), (3, 1, 0)]:
        scores = torch.randint(0, 6, (sum(layout.visual_counts),), generator=generator).float()
        plan = select(scores, layout, counts, floor)
        expected = []
        for start, present, count in zip(layout.visual_starts(), layout.visual_counts, counts):
            cut = slice(start, start + present)
            kept = naive_keep(scores[cut].tolist(), layout.visual_frame[cut].tolist(), count, floor)
            expected += [start + index for index in kept]
        assert plan.layout.visual_counts == counts
        assert torch.equal(layout.origin[layout.visual_index[expected]], plan.layout.origin[plan.layout.visual_index])
        layout = plan.layout


@pytest.mark.parametrize("num_frames", [0, 1, 2, 50])
def test_smoothing_is_the_mean_over_the_frames_around(num_frames):
    samples = [videos(4, 2, patches=3), videos(1, patches=2)]
    full = TokenLayout.from_samples(samples)
    generator = torch.Generator().manual_seed(0)
    reduced = select(torch.rand(20, generator=generator), full, (11, 1)).layout
    for layout in (full, reduced):
        scores = torch.rand(sum(layout.visual_counts), generator=generator)
        where = list(zip(layout.visual_frame.tolist(), layout.visual_patch.tolist()))
        expected = []
        for frame, patch in where:
            near = [
                scores[index]
                for index, (f, p) in enumerate(where)
                if p == patch and abs(f - frame) <= num_frames and layout.frame_videos[f] == layout.frame_videos[frame]
            ]
            expected.append(sum(near) / len(near))
        torch.testing.assert_close(smoothed(scores, layout, num_frames), torch.stack(expected))
    if num_frames == 50:
        # A patch has one score all over its video, to the bit.
        spread = smoothed(torch.rand(20, generator=generator), full, num_frames)
        assert torch.equal(spread[:12].view(4, 3), spread[:3].expand(4, 3))
    text = TokenLayout.from_samples([SampleLayout((Span(TEXT, 2),))])
    assert smoothed(torch.empty(0), text, num_frames).shape == (0,)


def test_a_token_gains_from_what_is_left_of_its_frame():
    frames = [Span(FRAME, 3, video, frame) for video, frame in ((0, 0), (0, 1), (1, 0))]
    full = TokenLayout.from_samples([SampleLayout((*frames[:2],)), SampleLayout((Span(TEXT, 2), frames[2]))])
    scores = torch.tensor([4.0, -1.0, 0.0, -2.0, -3.0, -4.0, 1.0, 2.0, 0.5])
    gained = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    assert torch.equal(with_frame(scores, full, 0.5), scores + gained)
    assert with_frame(scores, full, 0.0) is scores
    # The first token of the second frame has gone, and its score with it.
    left = select(torch.tensor([9.0, 8.0, 7.0, 0.0, 6.0, 5.0, 9.0, 8.0, 7.0]), full, (5, 3)).layout
    assert left.visual_patch.tolist() == [0, 1, 2, 1, 2, 0, 1, 2]
    rest = scores[[0, 1, 2, 4, 5, 6, 7, 8]]
    assert with_frame(rest, left, 1.0).tolist() == [8.0, 3.0, 4.0, -6.0, -7.0, 3.0, 4.0, 2.5]
    text = TokenLayout.from_samples([SampleLayout((Span(TEXT, 2),))])
    assert with_frame(torch.empty(0), text, 0.5).shape == (0,)
