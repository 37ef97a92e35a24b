"""Mamba-2 layers. Letters as in ``kind``."""

from __future__ import annotations

from collections.abc import Sequence

from hybridprune_megatron.layers.kind import (
    CONV_TAPS,
    Kept,
    LayerKind,
    Linear,
    ModelSizes,
    Parameters,
    norm_cost,
    residual_cost,
)
from hybridprune_megatron.layers.operations import Cost, causal_pairs, elementwise, linear

_FP32 = 4
#: Decays that the plain torch scan computes at once: as in ops/ssd_blocks.py, which imports torch.
SCAN_BLOCK_ELEMENTS = 1 << 19


class Mamba(LayerKind):
    """Mamba-2."""

    symbol, name, label, colour = "M", "mamba", "Mamba", "#0072B2"
    huggingface = ("mamba", "linear_attention")
    targets = ("in_proj", "out_proj")
    core = frozenset({"conv", "scan"})

    def score_sizes(self, model: ModelSizes) -> tuple[int, int, int]:
        return model.mamba_num_heads, model.mamba_num_groups, model.mamba_state_dim

    def split_sizes(self, model: ModelSizes) -> list[tuple[str, int]]:
        return [(f"model.{name}", getattr(model, name)) for name in ("mamba_num_groups", "mamba_num_heads")]

    def linears(self, model: ModelSizes) -> list[Linear]:
        return [Linear("in_proj", projected_rows(model), True), Linear("out_proj", inner_width(model), False)]

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        return [
            ("model.mamba_num_heads*mamba_head_dim (columns of out_proj)", inner_width(model), True),
            ("model.mamba_* (rows of in_proj)", projected_rows(model), True),
        ]

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        tokens, hidden, inner = sum(lengths), model.hidden_size, inner_width(model)
        return {
            "norm": norm_cost(tokens, hidden, width),
            "in_proj": linear(tokens, hidden, projected_rows(model), width),
            "conv": _convolution(lengths, convolved_channels(model), width),
            "scan": _scan(model, tokens, width),
            "gated_norm": elementwise(3 * tokens * inner + inner, width),
            "out_proj": linear(tokens, inner, hidden, width),
            "residual": residual_cost(tokens, hidden, width),
        }

    def parameters(self, model: ModelSizes) -> Parameters:
        hidden, heads, inner = model.hidden_size, model.mamba_num_heads, inner_width(model)
        # Taps and bias of the convolution; dt_bias, A_log and D per head; the gated norm.
        small = (CONV_TAPS + 1) * convolved_channels(model) + 3 * heads + inner
        return Parameters(hidden * projected_rows(model) + small + inner * hidden, hidden, 2 * heads)

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        inner, channels, heads = inner_width(model), convolved_channels(model), model.mamba_num_heads
        ends = [
            Kept("in_proj output", projected_rows(model), width, "channels"),
            Kept("raw dt", heads, _FP32, "channels", core=True),
            Kept("dt", heads, _FP32, "channels", core=True),
            Kept("group rsqrt", model.mamba_num_groups, _FP32, "channels"),
            Kept("out_proj input", inner, width, "channels"),
        ]
        if fused:
            return [
                *ends,
                Kept("conv input", channels, width, "channels", core=True),
                Kept("x, B, C", channels, width, "channels", core=True),
                Kept("sums of dt A", heads, _FP32, "channels", core=True),
                Kept("scan output", inner, width, "channels"),
            ]
        states = heads * model.mamba_head_dim * model.mamba_state_dim / model.mamba_chunk_size
        return [
            *ends,
            Kept("conv output", channels, width, "channels", core=True),
            # The scan works in fp32; a bf16 run continues with a copy of its output.
            Kept("x, B, C", channels, _FP32, "channels", core=True),
            Kept("scan output", inner, _FP32, "channels", core=width < _FP32),
            *([Kept("y", inner, width, "channels")] if width < _FP32 else []),
            # Those between chunks; each of the scan's blocks begins with one more, which is left out.
            Kept("states", states, _FP32, "channels", core=True),
        ]

    def context_activations(self, model: ModelSizes, width: int, tensor: int, context: int) -> list[Kept]:
        # A convolution's input and output for every group that goes to several ranks.
        repeated = max(0, context - model.mamba_num_groups // tensor)
        return [
            Kept("exchanged x, B, C, dt", exchanged_channels(model, tensor, context), width),
            Kept("repeated B, C", 2 * 2 * model.mamba_state_dim * repeated, width, core=True),
        ]

    def workspace(self, model: ModelSizes, tokens: int, tensor: int) -> int:
        """Of one block of chunks, all of it in fp32.

        Decays, their products and the gradient of these, one number for every pair of tokens of a chunk and head; five
        tensors as wide as x, four as wide as B, and the gradients of the states.
        """
        heads, chunk = model.mamba_num_heads // tensor, model.mamba_chunk_size
        groups = model.mamba_num_groups // tensor
        inner, state = heads * model.mamba_head_dim, model.mamba_state_dim
        block = min(tokens, chunk * max(1, SCAN_BLOCK_ELEMENTS // (heads * chunk * chunk)))
        numbers = 3 * heads * chunk + 5 * inner + 4 * groups * state + 2 * inner * state / chunk
        return round(_FP32 * numbers * block)

    def cache_bytes(self, model: ModelSizes, tokens: int, samples: int, width: int) -> int:
        """The last inputs of the convolution, and a state."""
        inputs = (CONV_TAPS - 1) * convolved_channels(model) * width
        return samples * (inputs + inner_width(model) * model.mamba_state_dim * _FP32)


def inner_width(model: ModelSizes) -> int:
    """Channels of x and z: H P."""
    return model.mamba_num_heads * model.mamba_head_dim


def convolved_channels(model: ModelSizes) -> int:
    """Channels of the convolution: x, B and C, H P + 2 G N."""
    return inner_width(model) + 2 * model.mamba_num_groups * model.mamba_state_dim


def projected_rows(model: ModelSizes) -> int:
    """Rows of in_proj: z, x, B, C and dt."""
    return inner_width(model) + convolved_channels(model) + model.mamba_num_heads


def exchanged_channels(model: ModelSizes, tensor: int, context: int) -> int:
    """Channels per token that a rank exchanges before the convolution: x, B, C and dt (z stays).

    Where a rank has fewer groups than there are context ranks, B and C of a group go to each rank that has its heads.
    """
    groups = max(model.mamba_num_groups // tensor, context)
    return (inner_width(model) + model.mamba_num_heads) // tensor + 2 * groups * model.mamba_state_dim


def _convolution(lengths: Sequence[int], channels: int, width: int) -> Cost:
    """Four taps per channel. Plain torch lays three zeros after every sample and convolves them too."""
    tokens = sum(lengths)
    per_token = 2 * CONV_TAPS * channels
    return Cost(
        flops=per_token * tokens,
        executed=per_token * (tokens + (CONV_TAPS - 1) * len(lengths)),
        bytes=width * (2 * tokens * channels + (CONV_TAPS + 1) * channels),
    )


def _scan(model: ModelSizes, tokens: int, width: int) -> Cost:
    """Chunked SSD: products within chunks, states written and read between them.

    Within a chunk every pair costs C.B once per group (2 N) and its product with x once per head (2 P); a token writes
    2 P N per head to its chunk's state and reads as much from the entering one. Chunks run over sample boundaries.
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
        bytes=width * tokens * (convolved_channels(model) + inner_width(model))
        + _FP32 * (tokens * heads + 2 * chunks * heads * head_dim * state),
    )
