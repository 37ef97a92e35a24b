"""What a score is made of: the base class of every score of ours and of anybody else's.

A score is one file. Its class derives from ``Scorer``, its fields are its keys under ``reduction.score``, and it says
what a block of keys (or of a Mamba layer's tokens) is worth::

    @dataclass(frozen=True)
    class KeyNorm(Scorer):
        '''Keys with a large norm stay.

        Attributes:
            power: of the norm.
        '''

        power: float = 1.0

        def attention(self, block: AttentionBlock) -> Tensor:
            return block.k.float().norm(dim=-1) ** self.power

The base walks samples and blocks, joins the keys that context-parallel ranks hold and pools over heads and ranks.

Torch is not imported here, nor by the files of our scores before they compute: the configuration reads their keys, and
says what is wrong with them, in a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hybridprune_megatron.layers.operations import Cost, elementwise
from hybridprune_megatron.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.merge import Ranking
    from hybridprune_megatron.method.signals import AttentionBlock, MambaBlock, ScoredSample, Signals

KEY = "reduction.score"
FP32 = 4


@dataclass(frozen=True)
class ScoreSizes:
    """How large the score of one layer is, for its cost.

    Attributes:
        tokens: all tokens that enter the layer.
        visual: the visual ones of them.
        question: tokens of the question.
        heads: query heads, or Mamba heads.
        groups: key-value heads, or groups of Mamba heads.
        channels: width of a head's key, or the state size.
        width: bytes of an activation.
    """

    tokens: int
    visual: int
    question: int
    heads: int
    groups: int
    channels: int
    width: int


class Score(Plugin):
    """What ``reduction.score`` chooses: how visual tokens are ranked in a layer. Deterministic, and free of state.

    Attributes:
        pairs_tokens: a token that goes is paired with one that stays by the score itself, so nothing else may change
            who stays.
        reads_signals: what mixers compute is read, which ranks that share a layer have to send each other.
    """

    pairs_tokens: ClassVar[bool] = False
    reads_signals: ClassVar[bool] = False

    def rows(self, question: int) -> int:
        """Tokens that score of a question of a length."""
        return question

    def check_heads(self, kind: str, groups: int, context: int) -> None:
        """Refuses a split of heads over context-parallel ranks that the pooling cannot join.

        Args:
            kind: name of the kind of layer.
            groups: of a tensor-parallel rank.
            context: ranks that share them.

        Raises:
            ConfigError: it does.
        """

    def costs(self, kind: str, sizes: ScoreSizes) -> Mapping[str, Cost]:
        """Operations and bytes of the score of one layer by what its mixer computes."""
        return {}

    def drop_costs(self, visual: int, left: int, hidden: int, width: int) -> Mapping[str, Cost]:
        """Operations and bytes of a ranking by hidden states.

        Args:
            visual: visual tokens before the drop.
            left: after it.
            hidden: width of the residual stream.
            width: bytes of an activation.
        """
        return {}


class OutputScorer(Score):
    """Ranks visual tokens by the hidden states after a layer, whatever kind of layer it was.

    Gets the whole packed sequence and all channels; every tensor-parallel rank ranks alike.
    """

    def rank(self, hidden: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """Who stays, and who takes in the others.

        Args:
            hidden: [L, D] after the layer.
            layout: the packed sequence that left the layer.
            counts: S numbers of visual tokens that stay (host).
        """
        raise NotImplementedError


class Scorer(Score):
    """Scores visual tokens by what a mixer computes; see the module's text.

    A class gives ``attention``, ``mamba`` or both; layers that it has nothing for cannot drop.

    Attributes:
        needs_question: whether a sample that asks nothing cannot be scored.
    """

    needs_question: ClassVar[bool] = True
    reads_signals: ClassVar[bool] = True

    def attention(self, block: AttentionBlock) -> Tensor:
        """float [J] or [J, heads...] of a block of keys; higher is more important."""
        raise NotImplementedError

    def mamba(self, block: MambaBlock) -> Tensor:
        """float [J] or [J, heads...] of a block of visual tokens; higher is more important."""
        raise NotImplementedError

    def pooling(self, kind: str) -> str:
        """How heads are joined in a kind of layer: "mean", "max_groups" ([J, groups, heads of a group]) or "max"."""
        return "mean"

    def cost(self, kind: str, sizes: ScoreSizes) -> Cost:
        """Operations and bytes of one layer's score; here: what a block holds is read once."""
        return elementwise(sizes.visual * sizes.groups * sizes.channels, sizes.width) + elementwise(sizes.visual, FP32)

    # What follows is the base's own business; a score that needs more than one pass replaces ``values``.

    def can_score(self, kind: str) -> bool:
        """Whether there is a formula for a kind of layer."""
        own = getattr(type(self), kind, None)
        return own is not None and own is not getattr(Scorer, kind, None)

    def score(self, signals: Signals, layout: TokenLayout, layer: int) -> Tensor:
        """Scores of all visual tokens of a packed sequence in one layer.

        Args:
            signals: what the layer's mixer has computed, this rank's heads.
            layout: the tokens that entered the layer.
            layer: 0-based, in the whole model.

        Returns:
            float32 [V] in the order of ``layout.visual_index``, higher is more important, pooled over the heads at
            hand; the caller pools over the ranks with the other heads, of which all have as many.
        """
        from hybridprune_megatron.method.signals import scored_samples

        samples = scored_samples(layout, self.rows, self.needs_question)
        scores = self.native_scores(signals, layout, samples)
        if scores is None:
            scores = signals.empty(layout)
            for place, values in self.values(signals, samples, layer):
                scores[place] = pooled(values, self.pooling(signals.kind)).float()
        return signals.of_visual(scores, layout)

    def values(
        self, signals: Signals, samples: Sequence[ScoredSample], layer: int
    ) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """For every block where its scores go, and the scores of all heads."""
        formula = getattr(self, signals.kind)
        for sample in samples:
            for block in signals.blocks(sample, layer):
                yield block.place, formula(block)

    def native_scores(self, signals: Signals, layout: TokenLayout, samples: Sequence[ScoredSample]) -> Tensor | None:
        """What a native operator makes of it, in the shape of ``signals.empty``; None: there is none."""
        return None

    def costs(self, kind: str, sizes: ScoreSizes) -> Mapping[str, Cost]:
        """See ``Score``."""
        return {"score": self.cost(kind, sizes)}


def pooled(per_head: Tensor, pooling: str) -> Tensor:
    """[J] from [J], [J, heads] or [J, groups, heads of a group]; equal rows give equal numbers, bitwise."""
    from hybridprune_megatron.method.sums import averaged

    if per_head.dim() == 1:
        return per_head
    if pooling == "mean":
        return averaged(per_head.flatten(1), 1)
    if pooling == "max_groups":
        return averaged(per_head, -1).flatten(1).amax(1)
    return per_head.flatten(1).amax(1)
