"""What every score must keep, ours or not: packing, ranks with a share of heads or keys, dtypes, settings, cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.export.configuration_hybridprune import exported_settings, merge_reduction, resolve_reduction
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.scorer import OutputScorer, Score, Scorer, ScoreSizes
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.method.signals import AttentionBlock, AttentionSignals, MambaBlock, MambaSignals
from hybridprune_megatron.plugins import plain

HEADS, KV_HEADS, WIDTH, GROUPS, STATE = 8, 4, 6, 4, 5
PATTERN = "M-M*-M-M*-"
SIZES = ScoreSizes(tokens=900, visual=700, question=20, heads=HEADS, groups=GROUPS, channels=WIDTH, width=2)


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """A score as somebody else would write it: reads keys, has a field of its own.

    Attributes:
        power: of the norm.
    """

    power: float = 2.0

    def attention(self, block: AttentionBlock) -> Tensor:
        return block.k.float().norm(dim=-1) ** self.power

    def mamba(self, block: MambaBlock) -> Tensor:
        return block.B.float().norm(dim=-1) ** self.power


FOREIGN = f"{__name__}.KeyNorm"
NAMES = [*(known.name for known in SCORERS.built_in), FOREIGN]
MIXER_NAMES = [name for name in NAMES if issubclass(SCORERS.find(name), Scorer)]


def layout_of(*frames: int) -> TokenLayout:
    samples = []
    for count in frames:
        shown = [Span(TokenKind.FRAME, 3, 0, frame) for frame in range(count)]
        samples.append(SampleLayout((Span(TokenKind.TEXT, 2), *shown, Span(TokenKind.QUESTION, 4))))
    return TokenLayout.from_samples(samples)


def signals_of(layout: TokenLayout, dtype: torch.dtype = torch.float32) -> list[AttentionSignals | MambaSignals]:
    generator = torch.Generator().manual_seed(layout.num_tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(layout.num_tokens, *shape, generator=generator)

    step = torch.nn.functional.softplus(randn(HEADS))
    attention = AttentionSignals.of(randn(HEADS, WIDTH).to(dtype), randn(KV_HEADS, WIDTH).to(dtype), layout)
    mamba = MambaSignals(randn(GROUPS, STATE).to(dtype), randn(GROUPS, STATE).to(dtype), step, -torch.ones(HEADS))
    return [attention, mamba]


def part_of(signals: AttentionSignals | MambaSignals, layout: TokenLayout, sample: int):
    """The signals of one sample alone."""
    starts, queries = layout.sample_starts(), layout.query_starts()
    tokens = slice(starts[sample], starts[sample + 1])
    if isinstance(signals, AttentionSignals):
        return AttentionSignals(signals.q[queries[sample] : queries[sample + 1]], signals.k[tokens])
    return replace(signals, B=signals.B[tokens], C=signals.C[tokens], dt=signals.dt[tokens])


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_packed_equals_one_by_one(name: str) -> None:
    frames = (7, 1, 4)
    layout, score = layout_of(*frames), SCORERS.build(name)
    for signals in signals_of(layout):
        packed = score.score(signals, layout, 2)
        assert packed.dtype == torch.float32
        assert torch.isfinite(packed).all()
        assert torch.equal(packed, score.score(signals, layout, 2)), "not deterministic"
        alone = [
            score.score(part_of(signals, layout, sample), layout_of(count), 2) for sample, count in enumerate(frames)
        ]
        torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_ranks_that_share_the_heads_agree(name: str) -> None:
    layout, score = layout_of(5, 3), SCORERS.build(name)
    for signals in signals_of(layout):
        if isinstance(signals, AttentionSignals):
            halves = [AttentionSignals(*each) for each in zip(signals.q.chunk(2, 1), signals.k.chunk(2, 1))]
        else:
            parts = (signals.B.chunk(2, 1), signals.C.chunk(2, 1), signals.dt.chunk(2, 1), signals.A.chunk(2))
            halves = [MambaSignals(*each) for each in zip(*parts)]
        each = torch.stack([score.score(half, layout, 1) for half in halves])
        joined = each.mean(0) if score.pooling(signals.kind) == "mean" else each.amax(0)
        torch.testing.assert_close(joined, score.score(signals, layout, 1))


class Held:
    """One of two ranks that hold every second key."""

    def __init__(self, layout: TokenLayout, rank: int, others: list[Tensor]) -> None:
        self.positions = torch.arange(rank, layout.num_tokens, 2)
        self.length, self.others = layout.num_tokens, others

    def rows(self, first: int, last: int) -> list[slice]:
        inside = torch.nonzero((self.positions >= first) & (self.positions < last)).flatten()
        return [slice(int(inside[0]), int(inside[-1]) + 1)] if len(inside) else []

    def total(self, log_sums: Tensor) -> Tensor:
        """What the other rank has is computed beforehand."""
        return torch.logaddexp(log_sums, self.others[0])

    def everywhere(self, values: Tensor) -> Tensor:
        result = torch.zeros(self.length)
        result[self.positions] = values
        return result


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_ranks_that_share_the_keys_agree(name: str) -> None:
    """Each rank's scores of its own keys are those of a rank that has all."""
    layout, score = layout_of(6, 4), SCORERS.build(name)
    signals = signals_of(layout)[0]
    assert isinstance(signals, AttentionSignals)
    whole = score.score(signals, layout, 1)
    sums: list[Tensor] = []

    class Recording(Held):
        def total(self, log_sums: Tensor) -> Tensor:
            sums.append(log_sums)
            return log_sums

    for rank in (0, 1):
        held = Recording(layout, rank, [])
        score.score(AttentionSignals(signals.q, signals.k[held.positions], held), layout, 1)
    for rank in (0, 1):
        held = Held(layout, rank, sums[1 - rank : 2 - rank])
        found = score.score(AttentionSignals(signals.q, signals.k[held.positions], held), layout, 1)
        mine = layout.visual_index % 2 == rank
        torch.testing.assert_close(found[mine], whole[mine])


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_half_precision_scores_near_full(name: str) -> None:
    layout, score = layout_of(9), SCORERS.build(name)
    for full, half in zip(signals_of(layout), signals_of(layout, torch.bfloat16)):
        exact, near = score.score(full, layout, 0), score.score(half, layout, 0)
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_settings_go_through_configuration_checkpoint_and_export(name: str) -> None:
    config = ReductionConfig.of({"budget": 0.5, "score": name})
    assert ReductionConfig.of(config.plain()) == config
    exported = resolve_reduction(PATTERN, exported_settings(config))
    assert exported["score"] == plain(config.score)
    again = resolve_reduction(PATTERN, merge_reduction(exported, {"budget": 0.6}))
    assert again["score"] == exported["score"]
    assert sum(again["retention"]) / len(PATTERN) == pytest.approx(0.6)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_costs_something(name: str) -> None:
    score: Score = SCORERS.build(name)
    found = {kind: score.costs(kind, SIZES) for kind in ("attention", "mamba")}
    found["drop"] = score.drop_costs(700, 300, 64, 2)
    asked = ["drop"] if isinstance(score, OutputScorer) else ["attention", "mamba"]
    for what in asked:
        assert sum(cost.bytes for cost in found[what].values()) > 0, what


def test_a_score_without_a_formula_for_a_kind_says_so() -> None:
    assert SCORERS.build(FOREIGN).can_score("mamba")

    @dataclass(frozen=True)
    class AttentionOnly(Scorer):
        def attention(self, block: AttentionBlock) -> Tensor:
            return block.k.float().sum(-1)

    assert AttentionOnly().can_score("attention")
    assert not AttentionOnly().can_score("mamba")
