"""A choice within chunks: every chunk ends with as many tokens as the others, near to what a global choice keeps."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.local_choice import competing_runs, local_quotas
from hybridprune_megatron.method.plan import select

CHUNKS = 4


def sample(text: int, frames: int, per_frame: int, question: int) -> SampleLayout:
    spans = [Span(TokenKind.TEXT, text), *(Span(TokenKind.FRAME, per_frame, 0, frame) for frame in range(frames))]
    return SampleLayout((*spans, Span(TokenKind.QUESTION, question)))


def padded(samples: list[SampleLayout], multiple_of: int) -> list[SampleLayout]:
    missing = -sum(each.num_tokens for each in samples) % multiple_of
    return [*samples, SampleLayout((Span(TokenKind.TEXT, missing),))] if missing else samples


def counts_for(samples: list[SampleLayout], shares: list[float], multiple_of: int) -> list[tuple[int, ...]]:
    """Shares of the visual tokens, with packed lengths that divide: the last sample with a video gives way."""
    text = sum(each.num_tokens - each.num_visual for each in samples)
    last = max(index for index, each in enumerate(samples) if each.num_visual)
    found = []
    for share in shares:
        counts = [round(share * each.num_visual) for each in samples]
        counts[last] += -(text + sum(counts)) % multiple_of
        found.append(tuple(counts))
    return found


CASES = {
    "one sample": [sample(3, 20, 9, 5)],
    "packed": [sample(7, 6, 9, 5), sample(2, 11, 4, 9), sample(30, 1, 5, 2)],
    "text between": [sample(40, 8, 9, 5), sample(50, 8, 9, 30)],
}


@pytest.mark.parametrize("multiple_of", [CHUNKS, 16])
@pytest.mark.parametrize("name", CASES)
def test_chunks_stay_even(name: str, multiple_of: int):
    samples = padded(CASES[name], multiple_of)
    counts = counts_for(samples, [1.0, 0.6, 0.6, 0.3, 0.15], multiple_of)
    by_layer = local_quotas(samples, counts, CHUNKS, multiple_of)
    kinds = torch.tensor([kind for each in samples for kind in each.kinds()])
    text = (kinds != TokenKind.FRAME).view(CHUNKS, -1).sum(1)
    for before, quotas, wanted in zip((by_layer[0], *by_layer), by_layer, counts):
        lengths = text + torch.tensor(quotas).sum(1)
        assert len(set(lengths.tolist())) == 1
        assert int(lengths.sum()) % multiple_of == 0
        # Not fewer than a global choice keeps, and more only where some chunk's text asks for it.
        assert int(lengths.sum()) >= int(text.sum()) + sum(wanted)
        assert int(lengths.sum()) == int(text.sum()) + sum(wanted) or int(lengths[0]) - int(text.max()) < multiple_of
        assert all(now <= then for row, old in zip(quotas, before) for now, then in zip(row, old))
    assert tuple(map(sum, zip(*by_layer[0]))) == tuple(each.num_visual for each in samples)


@pytest.mark.parametrize("name", CASES)
def test_the_best_of_every_chunk_stay(name: str):
    samples = padded(CASES[name], CHUNKS)
    counts = counts_for(samples, [1.0, 0.6, 0.3], CHUNKS)
    by_layer = local_quotas(samples, counts, CHUNKS, CHUNKS)
    layout = TokenLayout.from_samples(samples)
    length = layout.num_tokens // CHUNKS
    scores = torch.tensor(random.Random(3).sample(range(1000), len(layout.visual_index))).float()
    owners = layout.visual_index // length, layout.sample_index()[layout.visual_index]
    for present, kept in pairwise(by_layer):
        plan = select(scores, layout, tuple(map(sum, zip(*kept))), runs=competing_runs(present, kept))
        left = set(plan.layout.origin[plan.layout.visual_index].tolist())
        chosen = torch.tensor([origin in left for origin in layout.origin[layout.visual_index].tolist()])
        for chunk in range(CHUNKS):
            for number in range(len(samples)):
                mine = (owners[0] == chunk) & (owners[1] == number)
                if chosen[mine].any() and not chosen[mine].all():
                    assert scores[mine & chosen].min() > scores[mine & ~chosen].max()
        # No token changes its chunk.
        ends = plan.layout.num_tokens // CHUNKS
        assert torch.equal(torch.arange(plan.layout.num_tokens) // ends, plan.layout.origin // length)
        scores, owners = scores[chosen], tuple(owner[chosen] for owner in owners)
        layout = plan.layout
