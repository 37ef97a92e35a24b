"""Attention layers. Letters as in ``kind``."""

from __future__ import annotations

from collections.abc import Sequence

from hybridprune_megatron.layers.kind import Kept, LayerKind, Linear, ModelSizes, Parameters, norm_cost, residual_cost
from hybridprune_megatron.layers.operations import Cost, causal_pairs, linear

_FP32 = 4


class Attention(LayerKind):
    """Grouped-query attention."""

    symbol, name, label, colour = "*", "attention", "attention", "#D55E00"
    huggingface = ("attention", "full_attention")
    targets = ("linear_qkv", "linear_proj")
    core = frozenset({"attention"})

    def score_sizes(self, model: ModelSizes) -> tuple[int, int, int]:
        return model.num_attention_heads, model.num_query_groups, model.kv_channels

    def split_sizes(self, model: ModelSizes) -> list[tuple[str, int]]:
        return [(f"model.{name}", getattr(model, name)) for name in ("num_query_groups", "num_attention_heads")]

    def linears(self, model: ModelSizes) -> list[Linear]:
        queries, keys = widths(model)
        return [Linear("linear_qkv", queries + 2 * keys, True), Linear("linear_proj", queries, False)]

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        queries, keys = widths(model)
        rows = "model.num_attention_heads, num_query_groups, kv_channels (rows of linear_qkv)"
        return [
            ("model.num_attention_heads*kv_channels (columns of linear_proj)", queries, True),
            (rows, queries + 2 * keys, True),
        ]

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        tokens, hidden = sum(lengths), model.hidden_size
        queries, keys = widths(model)
        return {
            "norm": norm_cost(tokens, hidden, width),
            "qkv": linear(tokens, hidden, queries + 2 * keys, width),
            "attention": Cost(
                # q k^T and the product with v, 2 operations each per pair and channel of the queries.
                flops=sum(4 * queries * causal_pairs(length) for length in lengths),
                executed=sum(4 * queries * length**2 for length in lengths),
                bytes=width * tokens * (2 * queries + 2 * keys),
            ),
            "out_proj": linear(tokens, queries, hidden, width),
            "residual": residual_cost(tokens, hidden, width),
        }

    def parameters(self, model: ModelSizes) -> Parameters:
        queries, keys = widths(model)
        hidden = model.hidden_size
        return Parameters(hidden * (queries + 2 * keys) + queries * hidden, hidden)

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        queries, keys = widths(model)
        kept = [
            # Keys and values are views of the projection; the queries of interleaved groups are copied out of it.
            Kept("q, k, v", queries + 2 * keys, width, "channels"),
            Kept("q", queries, width, "channels"),
            Kept("log-sum-exp", model.num_attention_heads, _FP32, "channels", core=True),
            Kept("output", queries, width, "channels"),
        ]
        # Plain torch attends sample by sample and concatenates.
        return kept if fused else [*kept, Kept("outputs by sample", queries, width, "channels", core=True)]

    def context_activations(self, model: ModelSizes, width: int, tensor: int, context: int) -> list[Kept]:
        return [Kept("gathered k, v", 2 * widths(model)[1] * context, width, "channels", core=True)]

    def cache_bytes(self, model: ModelSizes, tokens: int, samples: int, width: int) -> int:
        """Keys and values."""
        return tokens * 2 * widths(model)[1] * width


def widths(model: ModelSizes) -> tuple[int, int]:
    """Widths of all queries, and of all keys (the values' is the same)."""
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
