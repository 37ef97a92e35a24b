"""Every scorer against its formula, written out with full matrices, on random tensors with odd sizes."""

import pytest
import torch

from hybridprune_megatron.method import score_query
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.scorers import SCORERS, Scorer, build_scorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals

HEADS, KV_HEADS, WIDTH, GROUPS, STATE = 6, 2, 5, 3, 7


def layout_of(*frame_lengths: int) -> TokenLayout:
    """One sample a length: text, frame, text, question, frame (if the first is long enough), answer."""
    samples = []
    for length in frame_lengths:
        early, late = length - length // 3, length // 3
        spans = [Span(TokenKind.TEXT, 2), Span(TokenKind.FRAME, early, 0, 0), Span(TokenKind.QUESTION, 3)]
        if late:
            spans += [Span(TokenKind.FRAME, late, 0, 1), Span(TokenKind.QUESTION, 2)]
        samples.append(SampleLayout((*spans, Span(TokenKind.ANSWER, 1))))
    samples.append(SampleLayout((Span(TokenKind.TEXT, 4),)))
    return TokenLayout.from_samples(samples)


def signals_of(layout: TokenLayout) -> tuple[AttentionSignals, MambaSignals]:
    generator = torch.Generator().manual_seed(layout.num_tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    length = layout.num_tokens
    attention = AttentionSignals(randn(length, HEADS, WIDTH), randn(length, KV_HEADS, WIDTH))
    step = torch.nn.functional.softplus(randn(length, HEADS))
    mamba = MambaSignals(randn(length, GROUPS, STATE), randn(length, GROUPS, STATE), step, -randn(HEADS).exp())
    return attention, mamba


def visual_columns(matrix_hLL: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Mean over heads and each sample's query rows, at the visual columns."""
    starts, queries = layout.sample_starts(), layout.query_starts()
    columns = torch.full((layout.num_tokens,), float("nan"))
    for sample in range(len(layout.sample_lengths)):
        rows = layout.query_index[queries[sample] : queries[sample + 1]]
        first, last = starts[sample], starts[sample + 1]
        columns[first:last] = matrix_hLL[:, rows, first:last].mean((0, 1))
    return columns[layout.visual_index]


def same_sample(layout: TokenLayout) -> torch.Tensor:
    sample = torch.repeat_interleave(torch.arange(len(layout.sample_lengths)), torch.tensor(layout.sample_lengths))
    causal = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool).tril()
    return causal & (sample[:, None] == sample[None, :])


def naive_attention(signals: AttentionSignals, layout: TokenLayout) -> torch.Tensor:
    k = signals.k.repeat_interleave(HEADS // KV_HEADS, 1)
    logits = torch.einsum("ihe,jhe->hij", signals.q, k) / WIDTH**0.5
    return visual_columns(logits.masked_fill(~same_sample(layout), -torch.inf).softmax(-1), layout)


def naive_mamba(signals: MambaSignals, layout: TokenLayout, decay: bool) -> torch.Tensor:
    per_head = HEADS // GROUPS
    products = torch.einsum("ign,jgn->gij", signals.C, signals.B).repeat_interleave(per_head, 0)
    matrix = products * signals.dt.T[:, None, :]
    if decay:
        log_decay = torch.cumsum(signals.dt.double() * signals.A, 0).T
        gap = (log_decay[:, :, None] - log_decay[:, None, :]).float()
        matrix = matrix * gap.masked_fill(~same_sample(layout), -torch.inf).exp()
    return visual_columns(matrix, layout)


def scorer_of(name: str, **settings: object) -> Scorer:
    return build_scorer({"scorer": name, **settings})


EXPECTED = {
    False: (naive_attention, lambda signals, layout: naive_mamba(signals, layout, decay=False)),
    True: (naive_attention, lambda signals, layout: naive_mamba(signals, layout, decay=True)),
}


@pytest.mark.parametrize("frames", [(1,), (5, 2), (31, 1, 12)])
@pytest.mark.parametrize("decay", EXPECTED)
def test_scores_equal_their_formula(decay, frames, monkeypatch):
    # Blocks that do not divide the lengths.
    monkeypatch.setattr(score_query, "_BLOCK", 8)
    layout = layout_of(*frames)
    attention, mamba = signals_of(layout)
    expected_attention, expected_mamba = EXPECTED[decay]
    scorer = scorer_of("query", mamba_decay=decay)
    torch.testing.assert_close(scorer.attention(attention, layout, 0), expected_attention(attention, layout))
    torch.testing.assert_close(scorer.mamba(mamba, layout, 0), expected_mamba(mamba, layout), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_is_finite_deterministic_and_blind_to_packing(name):
    """A packed sequence scores as its samples do one by one."""
    layout = layout_of(9, 4)
    attention, mamba = signals_of(layout)
    scorer = scorer_of(name)
    for score, signals in ((scorer.attention, attention), (scorer.mamba, mamba)):
        packed = score(signals, layout, 3)
        assert packed.shape == (13,)
        assert packed.dtype == torch.float32
        assert torch.isfinite(packed).all()
        assert torch.equal(packed, score(signals, layout, 3))
        alone_layout = layout_of(9)
        cut = slice(0, layout.sample_lengths[0] + 4)
        fields = {
            key: value if key == "A" else torch.cat([value[: layout.sample_lengths[0]], value[-4:]])[cut]
            for key, value in vars(signals).items()
        }
        alone = score(type(signals)(**fields), alone_layout, 3)
        torch.testing.assert_close(packed[:9], alone)


def test_answers_never_score():
    layout = layout_of(12)
    attention, mamba = signals_of(layout)
    scorer = scorer_of("query")
    before = scorer.attention(attention, layout, 0), scorer.mamba(mamba, layout, 0)
    answer = layout.sample_lengths[0] - 1
    attention.q[answer], mamba.C[answer] = 100.0, 100.0
    assert torch.equal(scorer.attention(attention, layout, 0), before[0])
    assert torch.equal(scorer.mamba(mamba, layout, 0), before[1])


def test_random_differs_between_layers_and_is_even():
    layout = layout_of(3000)
    attention, _ = signals_of(layout)
    scorer = scorer_of("random")
    first, second = scorer.attention(attention, layout, 0), scorer.attention(attention, layout, 1)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1
    assert abs(first.mean() - 0.5) < 0.03


def test_uniform_top_k_is_spread():
    layout = layout_of(64)
    attention, _ = signals_of(layout)
    scores = scorer_of("uniform").attention(attention, layout, 0)
    kept = scores.topk(8).indices.sort().values
    assert kept.tolist() == list(range(0, 64, 8))


def test_a_video_without_a_question_is_refused():
    layout = TokenLayout.from_samples([SampleLayout((Span(TokenKind.FRAME, 3, 0, 0), Span(TokenKind.ANSWER, 1)))])
    attention, mamba = signals_of(layout)
    for score in (
        lambda: scorer_of("query").attention(attention, layout, 0),
        lambda: scorer_of("query").mamba(mamba, layout, 0),
    ):
        with pytest.raises(ValueError, match="3 visual tokens and no question"):
            score()


def test_unknown_scorer_is_refused():
    with pytest.raises(ValueError, match=r"reduction\.scorer='magic': allowed are query"):
        scorer_of("magic")
