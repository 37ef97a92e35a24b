"""Native scores against the plain torch ones, on odd sizes and packed samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest
import torch

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.score_query import QueryScorer
from tests.kernels.backends import (
    BACKENDS,
    LAYOUTS,
    attention_of,
    device_of,
    fast_attention,
    fast_mamba,
    layout_of,
    mamba_of,
    moved,
    sample,
)

# Sums of float32 in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    # What is compared with is plain torch.
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
    return request.param


def attention_pair(backend, scorer, signals, layout):
    """The native scores and the plain ones."""
    scores = fast_attention(backend, signals, layout, scorer)
    assert scores.dtype == torch.float32
    return scores[layout.visual_index], scorer.score(signals, layout, 0)


def mamba_pair(backend, scorer, signals, layout):
    scores = fast_mamba(backend, signals, layout, scorer)
    assert scores.dtype == torch.float32
    return scores, scorer.score(signals, layout, 0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("rows", ["question", "last"])
def test_attention_scores_of_all_settings(backend, rows, pooling, causal, name):
    layout = layout_of(name, device_of(backend))
    scorer = QueryScorer(query_rows=rows, attention_pooling=pooling, attention_causal=causal)
    torch.testing.assert_close(*attention_pair(backend, scorer, attention_of(layout, 6, 2, 20), layout), **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(10, 2, 128), (4, 4, 64), (3, 1, 5), (5, 1, 72), (2, 1, 256)], ids=str)
def test_attention_scores_of_all_widths(backend, heads, dtype):
    layout = layout_of("packed", device_of(backend))
    signals = attention_of(layout, *heads, dtype)
    torch.testing.assert_close(*attention_pair(backend, QueryScorer(), signals, layout), **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("function", ["identity", "abs", "relu", "softmax"])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("dt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max_groups", "max_heads"])
def test_mamba_scores_of_all_settings(backend, pooling, dt, decay, function, name):
    layout = layout_of(name, device_of(backend))
    how = {"mamba_decay": decay, "mamba_dt": dt, "mamba_function": function, "mamba_pooling": pooling}
    scorer = QueryScorer(**how, mamba_contrast=False)
    torch.testing.assert_close(*mamba_pair(backend, scorer, mamba_of(layout, 3, 6, 20), layout), **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max_groups", "max_heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 6, 20), (1, 37, 7), (8, 16, 128)], ids=str)
def test_contrast_of_all_settings(backend, sizes, dtype, pooling, dt, name):
    layout = layout_of(name, device_of(backend))
    scorer = QueryScorer(mamba_dt=dt, mamba_pooling=pooling)
    torch.testing.assert_close(*mamba_pair(backend, scorer, mamba_of(layout, *sizes, dtype), layout), **CLOSE)


def shifted(rows: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, one element after an address that divides by 16."""
    whole = rows.new_empty(rows.numel() + 1)
    whole[1:] = rows.flatten()
    return whole[1:].view(rows.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_may_start_anywhere(backend, dtype):
    layout = layout_of("packed", device_of(backend))
    attention, mamba = attention_of(layout, 6, 2, 64, dtype), mamba_of(layout, 2, 4, 64, dtype)
    moved_attention = replace(attention, q=shifted(attention.q), k=shifted(attention.k))
    moved_mamba = replace(mamba, B=shifted(mamba.B), C=shifted(mamba.C))
    for function in ("identity", "softmax"):
        scorer = QueryScorer(mamba_function=function, mamba_contrast=function == "identity")
        assert torch.equal(*(fast_mamba(backend, each, layout, scorer) for each in (mamba, moved_mamba)))
    pair = (fast_attention(backend, each, layout, QueryScorer()) for each in (attention, moved_attention))
    assert torch.equal(*pair)


def test_contrast_keeps_what_plain_torch_keeps(backend):
    """500 random packs: an offset that all tokens share, signs that differ by head, tokens that are repeated.

    A fiber a thread is slow, so where kernels are emulated most packs are short.
    """
    random = Random(7)
    for number in range(500):
        lengths = (1, 5, 63, 64, 65, 257) if backend != "emulated" or number % 50 == 0 else (1, 5, 9)
        shown = [random.choice((0, *lengths)) for _ in range(random.randint(1, 3))]
        layout = TokenLayout.from_samples([sample(count, random.randint(1, 9)) for count in shown])
        layout = moved(layout, device_of(backend))
        groups, of_group = random.choice((1, 2, 8)), random.choice((1, 2, 5, 17))
        signals = mamba_of(layout, groups, groups * of_group, random.choice((4, 7, 32)))
        copies = torch.randint(layout.num_tokens, (layout.num_tokens,), generator=torch.Generator().manual_seed(number))
        signals = replace(signals, B=signals.B[copies] + random.choice((0.0, 3.0)), dt=signals.dt[copies])
        fast, plain = mamba_pair(backend, QueryScorer(mamba_dt=number % 2 == 0), signals, layout)
        counts = [random.randint(0, count) for count in layout.visual_counts]
        assert torch.equal(select(fast, layout, counts).kept, select(plain, layout, counts).kept), number


def test_contrast_does_not_wait_for_rows_to_be_averaged(backend):
    layout = layout_of("packed", device_of(backend))
    for settings in ({"mamba_function": "abs"}, {"mamba_decay": True}):
        with pytest.raises(RuntimeError, match="expected identity without log_decay"):
            fast_mamba(backend, mamba_of(layout, 3, 6, 20), layout, QueryScorer(**settings))
        # So the score itself takes plain torch.
        assert QueryScorer(**settings).native_scores(mamba_of(layout, 3, 6, 20), layout, []) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 32, 128), (8, 8, 64), (1, 3, 7), (5, 10, 72)], ids=str)
@pytest.mark.parametrize("function", ["identity", "softmax"])
def test_mamba_scores_of_all_widths(backend, function, sizes, dtype):
    layout = layout_of("packed", device_of(backend))
    signals = mamba_of(layout, *sizes, dtype)
    scorer = QueryScorer("last", mamba_function=function, mamba_pooling="max_groups", mamba_contrast=False)
    torch.testing.assert_close(*mamba_pair(backend, scorer, signals, layout), **CLOSE)


SIGNED = [{"mamba_contrast": False} | each for each in ({}, {"mamba_decay": True}, {"mamba_function": "softmax"})]


@pytest.mark.parametrize("settings", [{}, *SIGNED], ids=str)
def test_several_shares_of_a_first_pass_join(settings, monkeypatch):
    """On the CPU a share is 4,096 keys."""
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
    layout = TokenLayout.from_samples([sample(3, 1), sample(8300, 3)])
    scorer = QueryScorer(**settings)
    torch.testing.assert_close(*attention_pair("cpu", scorer, attention_of(layout, 2, 1, 8), layout), **CLOSE)
    torch.testing.assert_close(*mamba_pair("cpu", scorer, mamba_of(layout, 1, 2, 8), layout), **CLOSE)


@pytest.mark.parametrize("name", ["packed", "one token"])
def test_scores_are_the_same_bits_every_time_and_with_any_threads(name):
    layout = layout_of(name, torch.device("cpu"))
    scorers = [QueryScorer(), QueryScorer(mamba_function="softmax", mamba_decay=True, mamba_contrast=False)]
    threads, seen = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        attention = fast_attention("cpu", attention_of(layout, 6, 2, 20), layout, scorers[0])
        mamba = [fast_mamba("cpu", mamba_of(layout, 3, 6, 20), layout, scorer) for scorer in scorers]
        seen.append(torch.cat([attention, *mamba]))
    torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


@dataclass
class Shared:
    """Keys of one of two ranks; ``log_sums`` holds what both sent."""

    parts: list[slice]
    log_sums: list[torch.Tensor] = field(default_factory=list)

    @property
    def positions(self):
        return torch.cat([torch.arange(part.start, part.stop) for part in self.parts])

    def rows(self, first, last):
        found, row = [], 0
        for part in self.parts:
            start, stop = max(first, part.start), min(last, part.stop)
            if start < stop:
                found.append(slice(row + start - part.start, row + stop - part.start))
            row += part.stop - part.start
        return found

    def total(self, log_sums):
        self.log_sums.append(log_sums)
        return torch.logsumexp(torch.stack(self.log_sums), 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("backend_name", ["cpu", "emulated"])
def test_ranks_that_share_the_keys_score_as_one(backend_name, pooling, causal, monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
    layout = layout_of("packed", torch.device("cpu"))
    whole = attention_of(layout, 6, 2, 20)
    scorer = QueryScorer(attention_pooling=pooling, attention_causal=causal)
    cuts = [0, *(layout.num_tokens * i // 4 for i in (1, 2, 3)), layout.num_tokens]
    quarters = [slice(*pair) for pair in pairwise(cuts)]
    ranks = [[quarters[0], quarters[3]], [quarters[1], quarters[2]]]
    scores, sent = torch.empty(layout.num_tokens), []
    # The first round is for what the other rank would have sent.
    for _ in range(2):
        received, sent = sent, []
        for number, parts in enumerate(ranks):
            held = Shared(parts, received[1 - number : 2 - number])
            signals = replace(whole, k=torch.cat([whole.k[part] for part in parts]), held=held)
            scores[held.positions] = fast_attention(backend_name, signals, layout, scorer)
            sent.append(held.log_sums[-1])
    torch.testing.assert_close(scores[layout.visual_index], scorer.score(whole, layout, 0), **CLOSE)
