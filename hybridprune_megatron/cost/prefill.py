"""What one prefill costs, layer by layer, with and without reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.scoring import drop_operations, front_operations, scoring_operations
from hybridprune_megatron.cost.vision import projector_cost, tower_cost
from hybridprune_megatron.layers.kind import norm_cost
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import WIDTH, Cost, elementwise, linear, sum_costs
from hybridprune_megatron.method.counts import kept_counts
from hybridprune_megatron.method.reduction import at_least
from hybridprune_megatron.method.schedule import layer_symbols

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, ReductionConfig


def layer_operations(model: ModelConfig, symbol: str, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """The operations of one layer by name.

    Args:
        lengths: tokens of every sample of the packed sequence.
        width: bytes of an activation or weight.

    Raises:
        ValueError: an unknown symbol.
    """
    if symbol not in KINDS:
        raise ValueError(f"layer symbol {symbol!r}: allowed are {', '.join(KINDS)}")
    return KINDS[symbol].operations(model, lengths, width)


def head_cost(model: ModelConfig, tokens: int, rows: int, width: int) -> Cost:
    """Final norm over the tokens that are left, output layer over the rows whose logits are wanted."""
    return norm_cost(tokens, model.hidden_size, width) + linear(rows, model.hidden_size, model.vocab_size, width)


def embedding_cost(model: ModelConfig, tokens: int, width: int) -> Cost:
    """Looking up a row per token: no operation, one read and one write."""
    return elementwise(2 * tokens * model.hidden_size, width)


Operations = Mapping[str, Cost]


@dataclass(frozen=True)
class Prompt:
    """One sample: a video and a question.

    Attributes:
        visual: visual tokens before any reduction.
        text: all other tokens, the question among them.
        question: tokens of the question, which score.
        frames: frames of the video; 0: unknown, then tower and projector are left out.
    """

    visual: int
    text: int
    question: int
    frames: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the whole sample."""
        return self.visual + self.text


@dataclass(frozen=True)
class LayerRow:
    """One layer of the language model.

    Attributes:
        symbol: M, *, - or E.
        retention: share of the visual tokens that enters it.
        visual: visual tokens that enter it.
        full: operations without reduction.
        reduced: operations with it.
        scoring: what scoring and dropping after the layer add.
    """

    symbol: str
    retention: float
    visual: int
    full: Operations
    reduced: Operations
    scoring: Operations


@dataclass(frozen=True)
class Prefill:
    """A whole prefill.

    Attributes:
        prompt: the sample.
        rows: the layers.
        ends_full: embedding, final norm and output layer for one row, without reduction.
        ends_reduced: the same with it.
        front: reduction before the language model.
        vision: tower and projector; reduction cannot touch them.
    """

    prompt: Prompt
    rows: tuple[LayerRow, ...]
    ends_full: Operations
    ends_reduced: Operations
    front: Operations
    vision: Operations

    @property
    def full(self) -> Cost:
        """The language model without reduction."""
        return sum_costs(_all([*(row.full for row in self.rows), self.ends_full]))

    @property
    def reduced(self) -> Cost:
        """The language model with reduction, scoring included."""
        pieces = [piece for row in self.rows for piece in (row.reduced, row.scoring)]
        return sum_costs(_all([*pieces, self.ends_reduced, self.front]))

    @property
    def scoring(self) -> Cost:
        """Scoring and dropping, the front's included."""
        return sum_costs(_all([*(row.scoring for row in self.rows), self.front]))

    @property
    def before(self) -> Cost:
        """Tower and projector."""
        return sum_costs(self.vision.values())

    @property
    def speedup(self) -> float:
        """Operations of the language model without reduction over those with it."""
        return self.full.flops / self.reduced.flops

    @property
    def speedup_with_vision(self) -> float:
        """The same with tower and projector on both sides."""
        return (self.full + self.before).flops / (self.reduced + self.before).flops


def prefill_cost(
    model: ModelConfig, reduction: ReductionConfig, retention: Sequence[float], prompt: Prompt, precision: str
) -> Prefill:
    """Counts one prefill: all tokens in, the logits of the last one out.

    Args:
        reduction: scorer and smallest counts; its budget and schedule are in ``retention`` already.
        retention: share of the visual tokens that enters every layer.
        precision: fp32 or bf16.
    """
    width, symbols = WIDTH[precision], layer_symbols(model.hybrid_pattern)
    counts = kept_counts(_passed_on(model, reduction, retention, prompt), prompt.visual, reduction.select.min_tokens)
    full = {symbol: layer_operations(model, symbol, [prompt.tokens], width) for symbol in set(symbols)}
    rows = []
    for layer, symbol in enumerate(symbols):
        tokens, left = counts[layer] + prompt.text, counts[min(layer + 1, len(counts) - 1)]
        scoring: Operations = {}
        if left < counts[layer]:
            scoring = scoring_operations(model, reduction, symbol, tokens, counts[layer], prompt.question, width)
            scoring = {**scoring, **drop_operations(model, reduction, counts[layer], left, prompt.text, width)}
        rows.append(
            LayerRow(
                symbol=symbol,
                retention=retention[layer],
                visual=counts[layer],
                full=full[symbol],
                reduced=layer_operations(model, symbol, [tokens], width),
                scoring=scoring,
            )
        )
    vision = {}
    if model.vision is not None and prompt.frames:
        vision["tower"] = tower_cost(model.vision, prompt.frames, width)
        vision["projector"] = projector_cost(model.vision, model.hidden_size, prompt.frames, width)
    return Prefill(
        prompt,
        tuple(rows),
        ends_full=_ends(model, prompt.tokens, prompt.tokens, width),
        ends_reduced=_ends(model, prompt.tokens, counts[-1] + prompt.text, width),
        front=front_operations(model, reduction, prompt.visual, counts[0], width),
        vision=vision,
    )


def _passed_on(
    model: ModelConfig, reduction: ReductionConfig, retention: Sequence[float], prompt: Prompt
) -> tuple[float, ...]:
    """The retention under a front that keeps the first frame of a video whatever its share."""
    if not reduction.front.keeps_first_frames or model.vision is None:
        return tuple(retention)
    return at_least(retention, min(model.vision.tokens_per_frame, prompt.visual), prompt.visual)


def _ends(model: ModelConfig, tokens: int, left: int, width: int) -> Operations:
    return {"embedding": embedding_cost(model, tokens, width), "head": head_cost(model, left, 1, width)}


def _all(pieces: Sequence[Operations]) -> list[Cost]:
    return [cost for piece in pieces for cost in piece.values()]
