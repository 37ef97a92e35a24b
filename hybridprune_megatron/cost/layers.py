"""Operations and bytes of one layer of the language model and of its two ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridprune_megatron.layers.kind import norm_cost
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import Cost, elementwise, linear, sum_costs

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig


def layer_operations(model: ModelConfig, symbol: str, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """The operations of one layer by name.

    Args:
        model: dimensions.
        symbol: of the kind of layer.
        lengths: tokens of every sample of the packed sequence.
        width: bytes of an activation or weight.

    Raises:
        ValueError: an unknown symbol.
    """
    if symbol not in KINDS:
        raise ValueError(f"layer symbol {symbol!r}: allowed are {', '.join(KINDS)}")
    return KINDS[symbol].operations(model, lengths, width)


def layer_cost(model: ModelConfig, symbol: str, lengths: Sequence[int], width: int) -> Cost:
    """The sum of ``layer_operations``."""
    return sum_costs(layer_operations(model, symbol, lengths, width).values())


def head_cost(model: ModelConfig, tokens: int, rows: int, width: int) -> Cost:
    """Final norm over the tokens that are left, output layer over the rows whose logits are wanted."""
    return norm_cost(tokens, model.hidden_size, width) + linear(rows, model.hidden_size, model.vocab_size, width)


def embedding_cost(model: ModelConfig, tokens: int, width: int) -> Cost:
    """Looking up a row per token: no operation, one read and one write."""
    return elementwise(2 * tokens * model.hidden_size, width)
