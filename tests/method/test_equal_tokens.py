"""Equal tokens that the same rows see get equal scores, bitwise, wherever they lie, so that the earlier ones stay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals
from hybridprune_megatron.method.sums import averaged, on_grid, summed

#: Different tokens that a sample repeats.
KINDS = 5
#: Visual tokens, query tokens, heads, heads of keys or groups, width: on and next to the borders of blocks and of
#: vector registers, where a block of one token is left over, and where a sum is over one number only.
SIZES = [(1300, 3, 6, 2, 20), (1025, 1, 1, 1, 7), (513, 32, 8, 8, 64), (67, 5, 12, 3, 33), (129, 2, 16, 1, 128)]
MAMBA = [
    {"mamba_function": function, "mamba_dt": dt, "mamba_contrast": contrast, "mamba_pooling": pooling}
    for (function, dt, contrast), pooling in zip(
        itertools.product(("identity", "abs", "relu", "softmax"), (True, False), (True, False)),
        itertools.cycle(("mean", "max_groups", "max_heads")),
    )
]
ATTENTION = [
    {"attention_pooling": pooling, "attention_causal": causal}
    for pooling, causal in itertools.product(("mean", "max"), (True, False))
]


def repeated(kinds: Tensor, *shape: int, scale: float = 1.0, generator: torch.Generator) -> Tensor:
    """A row of its own for every token but the visual ones, which have that of their kind (-1: not visual)."""
    rows = torch.randn(len(kinds), *shape, generator=generator) * scale
    return torch.where((kinds < 0).view(-1, *[1] * len(shape)), rows, rows[:KINDS][kinds])


def _sample(visual: int, question: int) -> SampleLayout:
    spans = (Span(TokenKind.TEXT, 3), Span(TokenKind.FRAME, visual, 0, 0), Span(TokenKind.QUESTION, question))
    return SampleLayout((*spans, Span(TokenKind.ANSWER, 2)))


def packed_kinds(visual: int, question: int) -> tuple[TokenLayout, Tensor]:
    """Two samples, and the kind of every token."""
    layout = TokenLayout.from_samples([_sample(visual, question), _sample(visual // 3 + 1, question)])
    kinds = torch.full((layout.num_tokens,), -1)
    generator = torch.Generator().manual_seed(visual)
    kinds[layout.visual_index] = torch.randint(KINDS, layout.visual_index.shape, generator=generator)
    return layout, kinds


def signals_of(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[TokenLayout, Tensor, AttentionSignals, MambaSignals]:
    """A packed sequence of repeated tokens; kinds are of the visual tokens, another for every sample."""
    visual, question, heads, groups, width = sizes
    layout, kinds = packed_kinds(visual, question)
    generator = torch.Generator().manual_seed(sum(sizes))
    q = torch.randn(layout.num_tokens, heads, width, generator=generator).to(dtype)
    attention = AttentionSignals.of(q, repeated(kinds, groups, width, generator=generator).to(dtype), layout)
    B, C = (repeated(kinds, groups, width, generator=generator).to(dtype) for _ in range(2))
    dt = torch.nn.functional.softplus(repeated(kinds, heads, generator=generator) - 2)
    mamba = MambaSignals(B, C, dt, -torch.rand(heads, generator=generator))
    sample = torch.repeat_interleave(torch.tensor(layout.visual_counts))
    return layout, kinds[layout.visual_index] + KINDS * sample, attention, mamba


def assert_equal_within_kinds(scores: Tensor, kinds: Tensor) -> None:
    for kind in kinds.unique():
        found = scores[kinds == kind].unique()
        assert len(found) == 1, f"kind {kind}: {found.tolist()}"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain_scores(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    layout, kinds, attention, mamba = signals_of(sizes, dtype)
    for settings in ATTENTION:
        assert_equal_within_kinds(QueryScorer(**settings).score(attention, layout, 0), kinds)
    for settings in MAMBA:
        assert_equal_within_kinds(QueryScorer(**settings).score(mamba, layout, 0), kinds)


def test_of_equal_tokens_the_earlier_stay() -> None:
    layout, kinds, attention, mamba = signals_of(SIZES[0])
    for scores in (
        QueryScorer().score(attention, layout, 0),
        QueryScorer().score(mamba, layout, 0),
        QueryScorer(mamba_function="abs").score(mamba, layout, 0),
    ):
        counts = [count // 2 for count in layout.visual_counts]
        kept = torch.isin(layout.visual_index, select(scores, layout, counts).kept)
        for kind in kinds.unique():
            # Once one of a kind has gone, all later ones have.
            assert (kept[kinds == kind].long().diff() <= 0).all()


@pytest.mark.parametrize("settings", [{}, *({"mamba_function": name} for name in ("abs", "softmax"))], ids=str)
def test_a_sample_scores_the_same_alone_and_packed_bitwise(settings: dict[str, str]) -> None:
    layout, _, attention, mamba = signals_of(SIZES[3])
    for decay in (False, True):
        scorer = QueryScorer(mamba_decay=decay, **settings)
        length, visual, question = layout.sample_lengths[0], layout.visual_counts[0], layout.query_counts[0]
        alone = TokenLayout.from_samples([_sample(*SIZES[3][:2])])
        own = MambaSignals(mamba.B[:length], mamba.C[:length], mamba.dt[:length], mamba.A)
        assert torch.equal(scorer.score(mamba, layout, 0)[:visual], scorer.score(own, alone, 0))
        own_keys = AttentionSignals(attention.q[:question], attention.k[:length])
        assert torch.equal(scorer.score(attention, layout, 0)[:visual], scorer.score(own_keys, alone, 0))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 100])
def test_sums_are_those_of_their_numbers(length: int) -> None:
    values = torch.randn(5, length, 4, generator=torch.Generator().manual_seed(length))
    before = values.clone()
    torch.testing.assert_close(summed(values, 1), values.sum(1))
    torch.testing.assert_close(averaged(values, 1), values.mean(1))
    assert torch.equal(values, before)


@pytest.mark.parametrize("width", [1, 2, 5, 64, 128, 4096])
def test_products_on_the_grid_have_no_rounding(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows, keys = (torch.randn(9, width, generator=generator) for _ in range(2))
    # Outliers, small numbers, zeros and numbers that float32 holds only just.
    rows[0, 0], rows[1] = 1e4, 0.0
    rows[2] *= 1e-38
    keys[0] *= 1e30
    a, b = on_grid(rows), on_grid(keys)
    bits = (53 - (width - 1).bit_length()) // 2
    largest = rows.abs().amax(-1, keepdim=True).double()
    assert ((a - rows.double()).abs() <= largest * 2.0**-bits).all()
    # Products of two entries have less than 53 bits, and fsum rounds once.
    exact = [[math.fsum(x * y for x, y in zip(row, key)) for key in b.tolist()] for row in a.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64)
    for order in (torch.arange(width), torch.arange(width).flip(0), torch.randperm(width, generator=generator)):
        assert torch.equal(a[:, order] @ b[:, order].T, expected)
