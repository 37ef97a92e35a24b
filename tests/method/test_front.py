"""Every front against its formula, written out frame by frame and token by token; odd sizes, several videos, packed."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.method import front_ranking
from hybridprune_megatron.method.front import FRONTS
from hybridprune_megatron.method.front_ranking import patch_before
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.merge import take_merged
from hybridprune_megatron.method.plan import select

TOKENS, WIDTH = 4, 5
# Frames of the videos of every sample.
SAMPLES = [((7,),), ((3, 4), (), (5,)), ((1,), (2, 1, 3))]


def layout_of(samples, tokens: int = TOKENS) -> TokenLayout:
    """A text before every frame, a question after the last."""
    layouts = []
    for videos in samples:
        spans = [Span(TokenKind.TEXT, 2)]
        for video, frames in enumerate(videos):
            for frame in range(frames):
                spans += [Span(TokenKind.TEXT, 1), Span(TokenKind.FRAME, tokens, video, frame)]
        layouts.append(SampleLayout((*spans, Span(TokenKind.QUESTION, 3))))
    return TokenLayout.from_samples(layouts)


def frames_of(samples) -> list[tuple[int, int, int]]:
    """(sample, video, frame) of every frame in order."""
    return [(s, v, f) for s, videos in enumerate(samples) for v, count in enumerate(videos) for f in range(count)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels_of(samples, side: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (len(frames_of(samples)), 3, side, side), dtype=torch.uint8, generator=generator)


def naive_change(samples, difference) -> list[float]:
    """Change of every token since the frame before of its video; infinite in a first frame."""
    return [
        float("inf") if frame == 0 else difference(index, index - 1, token)
        for index, (_, _, frame) in enumerate(frames_of(samples))
        for token in range(TOKENS)
    ]


@pytest.mark.parametrize("samples", SAMPLES)
def test_evs_equals_its_formula(samples, monkeypatch):
    monkeypatch.setattr(front_ranking, "_BLOCK", 5)
    layout = layout_of(samples)
    features = random(len(layout.visual_index), WIDTH)

    def difference(now, before, token):
        a, b = features[now * TOKENS + token], features[before * TOKENS + token]
        return 1 - float((a @ b) / (a.norm() * b.norm()))

    scores = FRONTS.build({"name": "evs"}).rank(features, None, layout, layout.visual_counts).scores
    assert scores.tolist() == pytest.approx(naive_change(samples, difference), abs=1e-6)


@pytest.mark.parametrize("samples", SAMPLES)
def test_evs_on_pixels_equals_its_formula(samples, monkeypatch):
    monkeypatch.setattr(front_ranking, "_FRAME_BLOCK", 2)
    layout, pixels = layout_of(samples), pixels_of(samples)

    def difference(now, before, token):
        # 2 x 2 patches of 3 x 3 pixels.
        rows, columns = slice(3 * (token // 2), 3 * (token // 2) + 3), slice(3 * (token % 2), 3 * (token % 2) + 3)
        gap = pixels[now, :, rows, columns].double() - pixels[before, :, rows, columns].double()
        return float(gap.abs().sum()) / 27

    front = FRONTS.build({"name": "evs_pixels"})
    scores = front.rank(torch.empty(0), pixels, layout, layout.visual_counts).scores
    assert scores.tolist() == pytest.approx(naive_change(samples, difference), rel=1e-6)
    with pytest.raises(ValueError, match=r"reduction.front=evs_pixels compares frames.* set reduction.front=evs"):
        front.rank(torch.empty(0), None, layout, layout.visual_counts)


@pytest.mark.parametrize("samples", SAMPLES)
def test_evs_keeps_every_first_frame(samples):
    layout = layout_of(samples)
    firsts = [TOKENS * sum(frames > 0 for frames in videos) for videos in samples]
    assert FRONTS.build({"name": "evs"}).fewest(layout) == firsts
    scores = FRONTS.build({"name": "evs"}).rank(random(len(layout.visual_index), WIDTH), None, layout, firsts).scores
    kept = select(scores, layout, firsts).layout
    assert {layout.frame_videos[frame] for frame in kept.visual_frame.tolist()} == set(layout.frame_videos)
    assert (patch_before(layout)[torch.isin(layout.visual_index, kept.origin)] < 0).all()


def test_still_video_keeps_its_first_frame_and_the_earliest_after_it():
    layout = layout_of(((4,),))
    features = random(1, TOKENS, WIDTH).expand(4, -1, -1).flatten(0, 1)
    scores = FRONTS.build({"name": "evs"}).rank(features, None, layout, (9,)).scores
    # Equal up to rounding: made exactly equal here, for the order is what is asked about.
    kept = select(scores.round(decimals=3), layout, (9,)).layout
    assert torch.equal(kept.origin[kept.visual_index], layout.visual_index[:9])


def naive_tome(features: torch.Tensor, count: int) -> list[list[int]]:
    """Groups of tokens after merging, a round and a pair at a time, with sizes carried along."""
    groups = [[index] for index in range(len(features))]
    values = [features[index].double() for index in range(len(features))]
    where = list(range(len(features)))
    while len(where) > count:
        targets = where[1::2]

        def cosine(a, b):
            return float(values[a] @ values[b] / (values[a].norm() * values[b].norm()))

        pairs = [(source, max(targets, key=lambda t, s=source: cosine(s, t))) for source in where[0::2]]
        pairs.sort(key=lambda pair: -cosine(*pair))
        merging = pairs[: min(len(where) - count, len(where) // 2)]
        sums = {target: values[target] * len(groups[target]) for _, target in merging}
        for source, target in merging:
            sums[target] = sums[target] + values[source] * len(groups[source])
        for source, target in merging:
            groups[target] += groups[source]
            where.remove(source)
        for target, total in sums.items():
            values[target] = total / len(groups[target])
    return [sorted(groups[index]) for index in where]


@pytest.mark.parametrize(("frames", "count"), [(1, 3), (3, 11), (4, 5), (7, 2), (2, 8), (2, 1)])
def test_tome_equals_its_formula(frames, count):
    layout = layout_of(((frames,),))
    total = frames * TOKENS
    features = random(total, WIDTH, seed=frames)
    ranking = FRONTS.build({"name": "tome"}).rank(features, None, layout, (count,))
    plan = select(ranking.scores, layout, (count,))
    expected = naive_tome(features, count)
    kept = torch.searchsorted(layout.visual_index, plan.layout.origin[plan.layout.visual_index])
    assert [torch.nonzero(ranking.partner == token).flatten().tolist() for token in kept] == expected
    # The averages that the model gets.
    hidden = random(layout.num_tokens, 1, WIDTH, seed=9).index_copy(0, layout.visual_index, features.unsqueeze(1))
    merged = take_merged(hidden, layout, plan, ranking.partner)[plan.layout.visual_index, 0]
    torch.testing.assert_close(merged, torch.stack([features[group].mean(0) for group in expected]))


@pytest.mark.parametrize("name", ["random", "uniform", "evs", "evs_pixels", "tome"])
def test_fronts_are_blind_to_packing(name):
    """A packed sequence is ranked as its samples are one by one."""
    samples = ((3, 4), (), (5,))
    layout, pixels = layout_of(samples), pixels_of(samples)
    features = random(len(layout.visual_index), WIDTH)
    counts = (11, 0, 6)
    front = FRONTS.build({"name": name, "seed": 4} if name == "random" else name)
    packed = front.rank(features, pixels, layout, counts)
    assert packed.scores.shape == features.shape[:1]
    assert front.fewest(layout) == [front.fewest(layout_of((videos,)))[0] for videos in samples]
    first_token = first_frame = 0
    for videos, count in zip(samples, counts):
        frames = sum(videos)
        tokens = slice(first_token, first_token + frames * TOKENS)
        shown = pixels[first_frame : first_frame + frames]
        alone = front.rank(features[tokens], shown, layout_of((videos,)), (count,)) if frames else None
        if alone is not None:
            torch.testing.assert_close(packed.scores[tokens], alone.scores)
            if alone.partner is not None:
                assert torch.equal(packed.partner[tokens], alone.partner + first_token)
        first_token, first_frame = tokens.stop, first_frame + frames


def test_random_and_uniform_spread_over_the_sample():
    layout = layout_of(((500,),))
    features = random(len(layout.visual_index), WIDTH)
    uniform = FRONTS.build({"name": "uniform"}).rank(features, None, layout, (250,)).scores
    assert uniform.topk(250).indices.sort().values.tolist() == list(range(0, 2000, 8))
    first, second = (
        FRONTS.build({"name": "random", "seed": s}).rank(features, None, layout, ()).scores for s in (0, 1)
    )
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    assert abs(float(first.mean()) - 0.5) < 0.03
