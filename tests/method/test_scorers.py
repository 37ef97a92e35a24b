"""Every scorer against its formula, written out element by element, on random tensors with odd sizes."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.method import query_formula
from hybridprune_megatron.method import signals as signals_module
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.scorers import SCORERS
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
    attention = AttentionSignals.of(randn(length, HEADS, WIDTH), randn(length, KV_HEADS, WIDTH), layout)
    step = torch.nn.functional.softplus(randn(length, HEADS))
    mamba = MambaSignals(randn(length, GROUPS, STATE), randn(length, GROUPS, STATE), step, -randn(HEADS).exp())
    return attention, mamba


QUESTION_FIRST = SampleLayout(
    (
        Span(TokenKind.QUESTION, 2),
        Span(TokenKind.FRAME, 5, 0, 0),
        Span(TokenKind.FRAME, 4, 0, 1),
        Span(TokenKind.ANSWER, 3),
    )
)
LAYOUTS = {
    "one token": layout_of(1),
    "two samples": layout_of(5, 2),
    "packed": layout_of(17, 1, 6),
    "question first": TokenLayout.from_samples([QUESTION_FIRST, QUESTION_FIRST]),
}


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right))


def written_out(layout: TokenLayout, last: bool, masses: Callable) -> list[list[float]]:
    """For every visual token the means over rows of all heads, element by element.

    Args:
        layout: packed samples.
        last: whether only the last query token scores.
        masses: of (row, head, first token and end of the sample, its visual tokens) the mass of every visual token.
    """
    scores = []
    starts, queries, visuals = layout.sample_starts(), layout.query_starts(), layout.visual_starts()
    for sample in range(len(layout.sample_lengths)):
        rows = layout.query_index[queries[sample] : queries[sample + 1]].tolist()
        visual = layout.visual_index[visuals[sample] : visuals[sample + 1]].tolist()
        rows = rows[-1:] if last else rows
        first, end = starts[sample], starts[sample + 1]
        per_head = [[masses(row, head, first, end, visual) for row in rows] for head in range(HEADS)]
        scores += [[sum(row[j] for row in head) / len(rows) for head in per_head] for j in range(len(visual))]
    return scores


def naive_attention(signals: AttentionSignals, layout: TokenLayout, causal: bool, last: bool) -> list[list[float]]:
    q, k = dict(zip(layout.query_index.tolist(), signals.q.tolist())), signals.k.tolist()

    def masses(row: int, head: int, first: int, end: int, visual: list[int]) -> list[float]:
        seen = [j for j in range(first, end) if j <= row or (j in visual and not causal)]
        key = head * KV_HEADS // HEADS
        weight = {j: math.exp(dot(q[row][head], k[j][key]) / math.sqrt(WIDTH)) for j in seen}
        return [weight.get(j, 0.0) / sum(weight.values()) for j in visual]

    return written_out(layout, last, masses)


def naive_mamba(
    signals: MambaSignals, layout: TokenLayout, decay: bool, dt: bool, function: str, last: bool
) -> list[list[float]]:
    B, C, steps, A = (values.tolist() for values in (signals.B, signals.C, signals.dt, signals.A))

    def masses(row: int, head: int, first: int, end: int, visual: list[int]) -> list[float]:
        group = head * GROUPS // HEADS
        values = []
        for j in visual:
            value = dot(C[row][group], B[j][group]) * (steps[j][head] if dt else 1.0)
            if decay:
                passed = sum(steps[k][head] for k in range(j + 1, row + 1))
                value = value * math.exp(passed * A[head]) if j <= row else 0.0
            values.append(value)
        if function == "softmax":
            weight = [math.exp(value) if j <= row or not decay else 0.0 for j, value in zip(visual, values)]
            return [each / sum(weight) if each else 0.0 for each in weight]
        return [{"identity": value, "abs": abs(value), "relu": max(value, 0.0)}[function] for value in values]

    return written_out(layout, last, masses)


def naive_contrast(layout: TokenLayout, per_head: list[list[float]]) -> list[list[float]]:
    """Every head's distance from its mean over a sample's visual tokens, in standard deviations."""
    contrasted, start = [], 0
    for count in layout.visual_counts:
        own = per_head[start : start + count]
        moments = [(fmean(column), pstdev(column)) for column in zip(*own)]
        contrasted += [[abs(s - mean) / std if std else 0.0 for s, (mean, std) in zip(row, moments)] for row in own]
        start += count
    return contrasted


def max_groups(heads: list[float]) -> float:
    size = HEADS // GROUPS
    return max(fmean(heads[start : start + size]) for start in range(0, HEADS, size))


POOLED = {"mean": fmean, "max": max, "max_heads": max, "max_groups": max_groups}


def scorer_of(name: str, **settings: object) -> Scorer:
    return SCORERS.build({"name": name, **settings})


def assert_scores(actual: torch.Tensor, per_head: list[list[float]], pooling: str) -> None:
    expected = torch.tensor([POOLED[pooling](heads) for heads in per_head])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rows", ["question", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_scores_equal_their_formula(causal, rows, layout, monkeypatch):
    # Blocks that do not divide the lengths.
    monkeypatch.setattr(query_formula, "BLOCK", 12)
    monkeypatch.setattr(signals_module, "BLOCK", 12)
    signals, _ = signals_of(layout)
    per_head = naive_attention(signals, layout, causal, rows == "last")
    for pooling in ("mean", "max"):
        scorer = scorer_of("query", attention_pooling=pooling, attention_causal=causal, query_rows=rows)
        assert_scores(scorer.score(signals, layout, 0), per_head, pooling)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("function", ["identity", "abs", "relu", "softmax"])
@pytest.mark.parametrize("dt", [True, False])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("contrast", [True, False])
def test_mamba_scores_equal_their_formula(contrast, decay, dt, function, layout, monkeypatch):
    monkeypatch.setattr(query_formula, "BLOCK", 12)
    monkeypatch.setattr(signals_module, "BLOCK", 12)
    _, signals = signals_of(layout)
    settings = {"mamba_contrast": contrast, "mamba_decay": decay, "mamba_dt": dt, "mamba_function": function}
    for rows in ("question", "last"):
        per_head = naive_mamba(signals, layout, decay, dt, function, rows == "last")
        per_head = naive_contrast(layout, per_head) if contrast else per_head
        for pooling in ("mean", "max_groups", "max_heads"):
            scorer = scorer_of("query", query_rows=rows, mamba_pooling=pooling, **settings)
            assert_scores(scorer.score(signals, layout, 0), per_head, pooling)


def test_a_question_before_its_video_scores_only_where_it_may_look_ahead():
    layout = LAYOUTS["question first"]
    attention, mamba = signals_of(layout)
    for blind in (
        scorer_of("query").score(attention, layout, 0),
        scorer_of("query", mamba_decay=True).score(mamba, layout, 0),
    ):
        assert (blind == 0).all()
    for seeing in (
        scorer_of("query", attention_causal=False).score(attention, layout, 0),
        scorer_of("query").score(mamba, layout, 0),
    ):
        assert (seeing != 0).all()


@pytest.mark.parametrize("name", [known.name for known in SCORERS.built_in if issubclass(known, Scorer)])
def test_every_scorer_is_finite_deterministic_and_blind_to_packing(name):
    """A packed sequence scores as its samples do one by one."""
    layout = layout_of(9, 4)
    attention, mamba = signals_of(layout)
    scorer = scorer_of(name)
    score = scorer.score
    for signals in (attention, mamba):
        packed = score(signals, layout, 3)
        assert packed.shape == (13,)
        assert packed.dtype == torch.float32
        assert torch.isfinite(packed).all()
        assert torch.equal(packed, score(signals, layout, 3))
        alone_layout = layout_of(9)
        # The first sample and the text after all of them, of all tokens or of the query tokens.
        first = {"q": layout.query_counts[0]}
        fields = {
            key: torch.cat([value[: first.get(key, layout.sample_lengths[0])], value[-4:]])
            for key, value in vars(signals).items()
            if key not in ("A", "held")
        }
        alone = score(replace(signals, **fields), alone_layout, 3)
        torch.testing.assert_close(packed[:9], alone)


def pooled_over_ranks(scores: list[torch.Tensor], pooling: str) -> torch.Tensor:
    """As the stack does it over tensor-parallel ranks."""
    return torch.stack(scores).mean(0) if pooling == "mean" else torch.stack(scores).amax(0)


@pytest.mark.parametrize("function", ["identity", "softmax"])
@pytest.mark.parametrize(
    ("attention_pooling", "mamba_pooling"), [("mean", "mean"), ("max", "max_groups"), ("max", "max_heads")]
)
def test_ranks_with_a_share_of_the_heads_agree_with_all_heads(attention_pooling, mamba_pooling, function):
    layout = LAYOUTS["two samples"]
    attention, mamba = signals_of(layout)
    poolings = {"attention_pooling": attention_pooling, "mamba_pooling": mamba_pooling}
    scorer = scorer_of("query", mamba_function=function, **poolings)
    halves = zip(attention.q.chunk(KV_HEADS, 1), attention.k.chunk(KV_HEADS, 1))
    each = [scorer.score(AttentionSignals(*half), layout, 0) for half in halves]
    whole = scorer.score(attention, layout, 0)
    torch.testing.assert_close(pooled_over_ranks(each, scorer.pooling("attention")), whole)
    parts = (mamba.B.chunk(GROUPS, 1), mamba.C.chunk(GROUPS, 1), mamba.dt.chunk(GROUPS, 1), mamba.A.chunk(GROUPS))
    each = [scorer.score(MambaSignals(*share), layout, 0) for share in zip(*parts)]
    torch.testing.assert_close(pooled_over_ranks(each, scorer.pooling("mamba")), scorer.score(mamba, layout, 0))


@pytest.mark.parametrize(
    "settings", [{}, {"attention_causal": False, "mamba_decay": True, "mamba_function": "softmax"}]
)
def test_answers_never_score(settings):
    """Whatever an answer holds, the scores are the same to the bit, also where rows look ahead."""
    layout = TokenLayout.from_samples([QUESTION_FIRST, *[QUESTION_FIRST] * 2])
    attention, mamba = signals_of(layout)
    scorer = scorer_of("query", **settings)
    before = scorer.score(attention, layout, 0), scorer.score(mamba, layout, 0)
    for end in layout.sample_starts()[1:]:
        answer = slice(end - 3, end)
        attention.k[answer], mamba.C[answer], mamba.B[answer] = 100.0, 100.0, 100.0
        mamba.dt[answer] = 50.0
    assert torch.equal(scorer.score(attention, layout, 0), before[0])
    assert torch.equal(scorer.score(mamba, layout, 0), before[1])


def test_random_differs_between_layers_and_is_even():
    layout = layout_of(3000)
    attention, _ = signals_of(layout)
    scorer = scorer_of("random")
    first, second = scorer.score(attention, layout, 0), scorer.score(attention, layout, 1)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1
    assert abs(first.mean() - 0.5) < 0.03


def test_uniform_top_k_is_spread():
    layout = layout_of(64)
    attention, _ = signals_of(layout)
    scores = scorer_of("uniform").score(attention, layout, 0)
    kept = scores.topk(8).indices.sort().values
    assert kept.tolist() == list(range(0, 64, 8))


def test_a_video_without_a_question_is_refused():
    layout = TokenLayout.from_samples([SampleLayout((Span(TokenKind.FRAME, 3, 0, 0), Span(TokenKind.ANSWER, 1)))])
    attention, mamba = signals_of(layout)
    for score in (
        lambda: scorer_of("query").score(attention, layout, 0),
        lambda: scorer_of("query").score(mamba, layout, 0),
    ):
        with pytest.raises(ValueError, match="3 visual tokens and no question"):
            score()


def test_what_a_score_does_not_know_is_refused():
    for value, line in (
        ("magic", r"reduction\.score=magic: allowed are query, random, uniform, utrc, or the dotted path of a class"),
        ("querry", r"did you mean query\?"),
        ({"name": "query", "mamba_dcay": True}, r"reduction\.score\.mamba_dcay=True: .* did you mean .*mamba_decay\?"),
        ({"name": "query", "mamba_decay": 1}, r"reduction\.score\.mamba_decay='?1'?: must be true or false"),
        ({"name": "query", "query_rows": "first"}, r"reduction\.score\.query_rows=first: allowed are question, last"),
        ({"name": "random", "seed": -1}, r"reduction\.score\.seed=-1: must be at least 0"),
        ({"seed": 1}, "must be a name, or a name with its keys"),
        ("json.JSONDecoder", "is not a dataclass derived from Score"),
        ("no_such_package.Score", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=line) as error:
            SCORERS.build(value)
        assert "\n" not in str(error.value)
