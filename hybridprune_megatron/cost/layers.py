"""Operations and bytes of one layer of the language model, by operation, from the model's configuration.

Letters: L tokens, D hidden size, H heads, P Mamba head width, G groups, N state size, Q tokens a chunk, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hybridprune_megatron.layers.operations import Cost, causal_pairs, elementwise, linear, sum_costs

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig

CONV_TAPS = 4
_FP32 = 4


def mamba_inner(model: ModelConfig) -> int:
    """Channels of x and z in a Mamba layer: H P."""
    return model.mamba_num_heads * model.mamba_head_dim


def mamba_channels(model: ModelConfig) -> int:
    """Channels of the convolution: x, B and C, H P + 2 G N."""
    return mamba_inner(model) + 2 * model.mamba_num_groups * model.mamba_state_dim


def mamba_rows(model: ModelConfig) -> int:
    """Rows of in_proj: z, x, B, C and dt."""
    return mamba_inner(model) + mamba_channels(model) + model.mamba_num_heads


def exchanged_channels(model: ModelConfig, tensor: int, context: int) -> int:
    """Channels a token that a rank exchanges in front of the convolution: x, B, C and dt (z stays).

    Where a rank has fewer groups than there are context ranks, B and C of a group go to each rank that has its heads.
    """
    groups = max(model.mamba_num_groups // tensor, context)
    return (mamba_inner(model) + model.mamba_num_heads) // tensor + 2 * groups * model.mamba_state_dim


def attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths of all queries, and of all keys (the values' is the same)."""
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


def mamba_layer(model: ModelConfig, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """Norm, in_proj, convolution with SiLU, scan, gated norm, out_proj and residual of a Mamba-2 layer.

    Args:
        model: dimensions.
        lengths: tokens of every sample of the packed sequence.
        width: bytes of an activation or weight.
    """
    tokens, hidden, inner, channels = sum(lengths), model.hidden_size, mamba_inner(model), mamba_channels(model)
    return {
        "norm": _norm(tokens, hidden, width),
        "in_proj": linear(tokens, hidden, mamba_rows(model), width),
        "conv": _convolution(lengths, channels, width),
        "scan": _scan(model, tokens, width),
        "gated_norm": elementwise(3 * tokens * inner + inner, width),
        "out_proj": linear(tokens, inner, hidden, width),
        "residual": elementwise(3 * tokens * hidden, width),
    }


def attention_layer(model: ModelConfig, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """Norm, qkv, causal attention, output projection and residual; arguments as for ``mamba_layer``."""
    tokens, hidden = sum(lengths), model.hidden_size
    queries, keys = attention_widths(model)
    return {
        "norm": _norm(tokens, hidden, width),
        "qkv": linear(tokens, hidden, queries + 2 * keys, width),
        "attention": Cost(
            # q k^T and the product with v, 2 operations each per pair and channel of the queries.
            flops=sum(4 * queries * causal_pairs(length) for length in lengths),
            executed=sum(4 * queries * length**2 for length in lengths),
            bytes=width * tokens * (2 * queries + 2 * keys),
        ),
        "out_proj": linear(tokens, queries, hidden, width),
        "residual": elementwise(3 * tokens * hidden, width),
    }


def mlp_layer(model: ModelConfig, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """Norm, linear, squared ReLU, linear and residual; arguments as for ``mamba_layer``."""
    tokens, hidden = sum(lengths), model.hidden_size
    return {
        "norm": _norm(tokens, hidden, width),
        **_two_linears("", tokens, hidden, model.ffn_hidden_size, width),
        "residual": elementwise(3 * tokens * hidden, width),
    }


def expert_layer(model: ModelConfig, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """Norm, router, routed and shared experts and residual; arguments as for ``mamba_layer``.

    Tokens are dropped by no capacity; all experts' weights are read once, as with many tokens.
    """
    experts, tokens, hidden = model.experts, sum(lengths), model.hidden_size
    assert experts is not None, "an E layer comes with its experts' sizes"
    visits = tokens * experts.experts_per_token
    inner = experts.latent_size or hidden
    latent = {}
    if experts.latent_size is not None:
        latent = {
            "to_latent": linear(tokens, hidden, inner, width),
            "from_latent": linear(tokens, inner, hidden, width),
        }
    shared = {}
    if experts.shared_ffn_hidden_size:
        shared = _two_linears("shared_", tokens, hidden, experts.shared_ffn_hidden_size, width)
    weights = 2 * inner * experts.ffn_hidden_size
    return {
        "norm": _norm(tokens, hidden, width),
        "router": linear(tokens, hidden, experts.num_experts, width),
        **latent,
        **_two_linears("routed_", visits, inner, experts.ffn_hidden_size, width),
        "other_experts_weights": elementwise((experts.num_experts - 1) * weights, width),
        # Tokens are copied to their experts and the weighted results added up.
        "dispatch": elementwise(2 * (tokens + visits) * inner, width),
        **shared,
        "residual": elementwise(3 * tokens * hidden, width),
    }


_LAYERS: dict[str, Callable[..., dict[str, Cost]]] = {
    "M": mamba_layer,
    "*": attention_layer,
    "-": mlp_layer,
    "E": expert_layer,
}


def layer_operations(model: ModelConfig, symbol: str, lengths: Sequence[int], width: int) -> dict[str, Cost]:
    """The operations of one layer by name.

    Args:
        model: dimensions.
        symbol: M, *, - or E.
        lengths: tokens of every sample of the packed sequence.
        width: bytes of an activation or weight.

    Raises:
        ValueError: an unknown symbol.
    """
    if symbol not in _LAYERS:
        raise ValueError(f"layer symbol {symbol!r}: allowed are {', '.join(_LAYERS)}")
    return _LAYERS[symbol](model, lengths, width)


def layer_cost(model: ModelConfig, symbol: str, lengths: Sequence[int], width: int) -> Cost:
    """The sum of ``layer_operations``."""
    return sum_costs(layer_operations(model, symbol, lengths, width).values())


def head_cost(model: ModelConfig, tokens: int, rows: int, width: int) -> Cost:
    """Final norm over the tokens that are left, output layer over the rows whose logits are wanted."""
    return _norm(tokens, model.hidden_size, width) + linear(rows, model.hidden_size, model.vocab_size, width)


def embedding_cost(model: ModelConfig, tokens: int, width: int) -> Cost:
    """Looking up a row a token: no operation, one read and one write."""
    return elementwise(2 * tokens * model.hidden_size, width)


def _norm(tokens: int, hidden: int, width: int) -> Cost:
    return elementwise(2 * tokens * hidden + hidden, width)


def _two_linears(prefix: str, tokens: int, hidden: int, ffn: int, width: int) -> dict[str, Cost]:
    return {
        f"{prefix}fc1": linear(tokens, hidden, ffn, width),
        f"{prefix}activation": elementwise(2 * tokens * ffn, width),
        f"{prefix}fc2": linear(tokens, ffn, hidden, width),
    }


def _convolution(lengths: Sequence[int], channels: int, width: int) -> Cost:
    """Four taps a channel. Plain torch lays three zeros behind every sample and convolves them too."""
    tokens = sum(lengths)
    per_token = 2 * CONV_TAPS * channels
    return Cost(
        flops=per_token * tokens,
        executed=per_token * (tokens + (CONV_TAPS - 1) * len(lengths)),
        bytes=width * (2 * tokens * channels + (CONV_TAPS + 1) * channels),
    )


def _scan(model: ModelConfig, tokens: int, width: int) -> Cost:
    """Chunked SSD: products within chunks, states written and read between them.

    Within a chunk every pair costs C.B once a group (2 N) and its product with x once a head (2 P); a token writes
    2 P N a head to its chunk's state and reads as much from the entering one. Chunks run over sample boundaries.
    """
    heads, head_dim = model.mamba_num_heads, model.mamba_head_dim
    groups, state, chunk = model.mamba_num_groups, model.mamba_state_dim, model.mamba_chunk_size
    per_pair = 2 * groups * state + 2 * heads * head_dim
    states = 4 * heads * head_dim * state * tokens
    whole, rest = divmod(tokens, chunk)
    chunks = whole + bool(rest)
    return Cost(
        flops=per_pair * (whole * causal_pairs(chunk) + causal_pairs(rest)) + states,
        executed=per_pair * (whole * chunk**2 + rest**2) + states,
        # x, B, C in, y out; dt and the states of the chunks in fp32, a state written and read once.
        bytes=width * tokens * (mamba_channels(model) + mamba_inner(model))
        + _FP32 * (tokens * heads + 2 * chunks * heads * head_dim * state),
    )
