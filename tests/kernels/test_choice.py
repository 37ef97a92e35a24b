"""What stays: the same tokens by the native scores as by the plain ones, and of equal tokens the earlier ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals
from tests.kernels.backends import BACKENDS, device_of, fast_attention, fast_mamba, moved
from tests.method.test_equal_tokens import ATTENTION, MAMBA, SIZES, assert_equal_within_kinds, signals_of

PACKS = 500


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    # What is compared with is plain torch.
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equal_tokens_get_equal_scores(backend, sizes, dtype):
    if backend == "emulated":
        # A fiber a thread: slow, and the same for every tile.
        sizes = (min(sizes[0], 130), min(sizes[1], 5), *sizes[2:])
    layout, kinds, attention, mamba = signals_of(sizes, dtype)
    layout, attention, mamba = (moved(each, device_of(backend)) for each in (layout, attention, mamba))
    for settings in ATTENTION:
        scorer = QueryScorer(**settings)
        scores = fast_attention(backend, attention, layout, scorer)
        assert_equal_within_kinds(scores[layout.visual_index].cpu(), kinds)
    for settings in MAMBA:
        if settings["mamba_contrast"] and settings["mamba_function"] != "identity":
            # Plain torch alone has it.
            continue
        scorer = QueryScorer(**settings)
        scores = fast_mamba(backend, mamba, layout, scorer)
        assert_equal_within_kinds(scores.cpu(), kinds)


def pack_of(seed: int) -> tuple[TokenLayout, AttentionSignals, MambaSignals]:
    """Random samples, some of whose tokens are equal, and decays from slow ones to those far below float32."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    samples = [
        SampleLayout(
            (
                Span(TokenKind.TEXT, number(1, 3)),
                Span(TokenKind.FRAME, number(1, 90), 0, 0),
                Span(TokenKind.QUESTION, number(1, 7)),
                Span(TokenKind.FRAME, number(1, 20), 0, 1),
                Span(TokenKind.QUESTION, 1),
                Span(TokenKind.ANSWER, 2),
            )
        )
        for _ in range(number(1, 3))
    ]
    layout = TokenLayout.from_samples(samples)
    length, groups, width = layout.num_tokens, number(1, 3), number(1, 40)
    heads = groups * number(1, 3)
    dtype = torch.bfloat16 if number(0, 3) == 0 else torch.float32
    # Some tokens are an earlier one again.
    source = torch.arange(length)
    again = torch.rand(length, generator=generator) < 0.3
    source[again] = (source * torch.rand(length, generator=generator)).long()[again]

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(length, *shape, generator=generator)[source]

    q, k, B, C = (rows(count, width).to(dtype) for count in (heads, groups, groups, groups))
    dt = torch.nn.functional.softplus(2 * rows(heads) + number(-4, 4))
    rate = -torch.rand(heads, generator=generator) * 10.0 ** number(-3, 1)
    return layout, AttentionSignals.of(q, k, layout), MambaSignals(B, C, dt, rate)


SETTINGS = [
    {
        "mamba_function": function,
        "mamba_decay": decay,
        "mamba_dt": dt,
        "mamba_pooling": pooling,
        "mamba_contrast": False,
    }
    for (decay, dt), function, pooling in itertools.product(
        [(True, True), (True, False), (False, True)],
        ("identity", "abs", "relu", "softmax"),
        ("mean", "max_groups", "max_heads"),
    )
]


def test_the_same_tokens_stay_as_by_the_plain_scores(backend):
    for seed in range(PACKS if backend == "cpu" else PACKS // 10):
        layout, attention, mamba = pack_of(seed)
        layout, attention, mamba = (moved(each, device_of(backend)) for each in (layout, attention, mamba))
        scorer = QueryScorer(**SETTINGS[seed % len(SETTINGS)], **ATTENTION[seed % len(ATTENTION)])
        scores = fast_attention(backend, attention, layout, scorer)[layout.visual_index]
        pairs = {
            "attention": (scores, scorer.score(attention, layout, 0)),
            "mamba": (fast_mamba(backend, mamba, layout, scorer), scorer.score(mamba, layout, 0)),
        }
        counts = [round((0.1, 0.25, 0.5, 0.9)[seed // 2 % 4] * count) for count in layout.visual_counts]
        for name, (fast, plain) in pairs.items():
            kept = select(fast, layout, counts).kept
            assert torch.equal(kept, select(plain, layout, counts).kept), f"pack {seed}, {name}: {scorer}"


@pytest.mark.parametrize("function", ["identity", "abs", "relu", "softmax"])
def test_decays_that_no_float32_holds_are_the_same_in_both(backend, function):
    """Long before the question, tokens differ by less than float32 tells; both round the same number once."""
    spans = (Span(TokenKind.FRAME, 400, 0, 0), Span(TokenKind.QUESTION, 4), Span(TokenKind.ANSWER, 1))
    layout = moved(TokenLayout.from_samples([SampleLayout(spans)]), device_of(backend))
    generator = torch.Generator().manual_seed(5)
    B, C = (torch.randn(405, 2, 16, generator=generator) for _ in range(2))
    scorer = QueryScorer(mamba_decay=True, mamba_function=function, mamba_contrast=False)
    for rate in (0.02, 0.3, 2.0, 40.0):
        A = -rate * torch.tensor([1.0, 1.1, 0.5, 2.0])
        mamba = moved(MambaSignals(B, C, torch.rand(405, 4, generator=generator), A), device_of(backend))
        fast = fast_mamba(backend, mamba, layout, scorer)
        plain = scorer.score(mamba, layout, 0)
        for count in (1, 40, 100, 200, 390):
            assert torch.equal(select(fast, layout, [count]).kept, select(plain, layout, [count]).kept)


def test_a_token_without_a_step_has_the_score_of_its_double(backend):
    layout, _, _, mamba = signals_of(SIZES[3])
    B, dt = mamba.B.clone(), mamba.dt.clone()
    first, second = layout.visual_index[20:22]
    B[second], dt[second] = B[first], 0.0
    layout, mamba = moved(layout, device_of(backend)), moved(replace(mamba, B=B, dt=dt), device_of(backend))
    for function in ("identity", "abs", "relu", "softmax"):
        scorer = QueryScorer(mamba_decay=True, mamba_dt=False, mamba_function=function, mamba_contrast=False)
        for scores in (
            fast_mamba(backend, mamba, layout, scorer),
            scorer.score(mamba, layout, 0),
        ):
            assert scores[20] == scores[21]
