"""MLP layers: linear, squared ReLU, linear."""

from __future__ import annotations

from collections.abc import Sequence

from hybridprune_megatron.layers.kind import Kept, LayerKind, Linear, ModelSizes, Parameters, norm_cost, residual_cost
from hybridprune_megatron.layers.operations import Cost, elementwise, linear


class Mlp(LayerKind):
    """MLP."""

    symbol, name, label, colour = "-", "mlp", "MLP", "#999999"
    huggingface = ("mlp",)
    targets = ("linear_fc1", "linear_fc2")

    def split_sizes(self, model: ModelSizes) -> list[tuple[str, int]]:
        return [("model.ffn_hidden_size", model.ffn_hidden_size)]

    def linears(self, model: ModelSizes) -> list[Linear]:
        return [Linear("linear_fc1", model.ffn_hidden_size, True), Linear("linear_fc2", model.ffn_hidden_size, False)]

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        return [("model.ffn_hidden_size", model.ffn_hidden_size, True)]

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        tokens, hidden = sum(lengths), model.hidden_size
        return {
            "norm": norm_cost(tokens, hidden, width),
            **two_linears("", tokens, hidden, model.ffn_hidden_size, width),
            "residual": residual_cost(tokens, hidden, width),
        }

    def parameters(self, model: ModelSizes) -> Parameters:
        return Parameters(2 * model.hidden_size * model.ffn_hidden_size, model.hidden_size)

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        # relu(x) and relu(x)^2, which is the second linear's input.
        return [Kept(name, model.ffn_hidden_size, width, "channels") for name in ("relu", "squared")]


def two_linears(prefix: str, tokens: int, hidden: int, ffn: int, width: int) -> dict[str, Cost]:
    """An MLP without norm and residual, by operation."""
    return {
        f"{prefix}fc1": linear(tokens, hidden, ffn, width),
        f"{prefix}activation": elementwise(2 * tokens * ffn, width),
        f"{prefix}fc2": linear(tokens, ffn, hidden, width),
    }
