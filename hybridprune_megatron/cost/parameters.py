"""Parameters of every part of the model, as one rank of a tensor-parallel group holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET
from hybridprune_megatron.cost.layers import (
    CONV_TAPS,
    attention_widths,
    mamba_channels,
    mamba_inner,
    mamba_rows,
)
from hybridprune_megatron.cost.vision import projector_input

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, VisionConfig
    from hybridprune_megatron.config.tuning_schema import LoraConfig

_COLOURS = 3


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one part.

    Attributes:
        split: split over tensor-parallel ranks.
        replicated: held by every rank.
        fp32: of the split ones, those that stay fp32 whatever the precision (decay rates and skips of Mamba).
        experts: routed experts', split over expert-parallel ranks.
    """

    split: int = 0
    replicated: int = 0
    fp32: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.split + other.split,
            self.replicated + other.replicated,
            self.fp32 + other.fp32,
            self.experts + other.experts,
        )

    @property
    def total(self) -> int:
        """Parameters of the whole part."""
        return self.split + self.replicated + self.experts

    def on_rank(self, tensor: int) -> tuple[int, int]:
        """Parameters of one rank in the run's precision, and those in fp32; without routed experts'."""
        fp32 = self.fp32 // tensor
        return self.split // tensor + self.replicated - fp32, fp32


def layer_parameters(model: ModelConfig, symbol: str) -> Parameters:
    """One layer with its norm.

    Args:
        model: dimensions.
        symbol: M, *, - or E.
    """
    hidden = model.hidden_size
    if symbol == "M":
        heads, inner = model.mamba_num_heads, mamba_inner(model)
        # Taps and bias of the convolution; dt_bias, A_log and D a head; the gated norm.
        small = (CONV_TAPS + 1) * mamba_channels(model) + 3 * heads + inner
        return Parameters(hidden * mamba_rows(model) + small + inner * hidden, hidden, 2 * heads)
    if symbol == "*":
        queries, keys = attention_widths(model)
        return Parameters(hidden * (queries + 2 * keys) + queries * hidden, hidden)
    if symbol == "-":
        return Parameters(2 * hidden * model.ffn_hidden_size, hidden)
    assert symbol == "E", symbol
    experts = model.experts
    assert experts is not None, "an E layer comes with its experts' sizes"
    inner = experts.latent_size or hidden
    latent = 2 * hidden * inner if experts.latent_size is not None else 0
    return Parameters(
        2 * hidden * experts.shared_ffn_hidden_size,
        # Norm and router, whose correction bias is none of its parameters.
        hidden + experts.num_experts * hidden + latent,
        experts=2 * inner * experts.ffn_hidden_size * experts.num_experts,
    )


def adapter_parameters(model: ModelConfig, symbol: str, lora: LoraConfig) -> Parameters:
    """The low-rank adapters of one layer: A [r, in] and B [out, r] of every linear that has one.

    Ranks split B of a column-parallel linear and A of a row-parallel one; the other half lies on every rank.
    """
    hidden = model.hidden_size
    queries, keys = attention_widths(model)
    column, row = {
        "M": (("in_proj", mamba_rows(model)), ("out_proj", mamba_inner(model))),
        "*": (("linear_qkv", queries + 2 * keys), ("linear_proj", queries)),
        "-": (("linear_fc1", model.ffn_hidden_size), ("linear_fc2", model.ffn_hidden_size)),
        # Experts have no adapters.
        "E": (("", 0), ("", 0)),
    }[symbol]
    # The other side of both is the residual stream.
    return sum(
        (Parameters(lora.rank * wide, lora.rank * hidden) for name, wide in (column, row) if name in lora.targets),
        Parameters(),
    )


def embedding_parameters(model: ModelConfig) -> Parameters:
    """The token embedding; the output layer has as many unless they are tied."""
    return Parameters(model.vocab_size * model.hidden_size)


def final_norm_parameters(model: ModelConfig) -> Parameters:
    """The norm in front of the output layer."""
    return Parameters(replicated=model.hidden_size)


def tower_parameters(vision: VisionConfig) -> Parameters:
    """The vision tower, which every tensor-parallel rank holds whole."""
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    block = (
        # q, k, v and output with biases; two linears with biases; two LayerNorms; two layer scales
        4 * (hidden * hidden + hidden) + 2 * hidden * ffn + ffn + hidden + 4 * hidden + 2 * hidden
    )
    positions = (vision.position_grid_px // vision.patch_size) ** 2
    patches = _COLOURS * vision.patch_size**2 * hidden
    prefix = vision.num_cls_tokens + vision.num_register_tokens
    return Parameters(replicated=vision.num_layers * block + patches + (positions + prefix) * hidden)


def projector_parameters(vision: VisionConfig, output_size: int) -> Parameters:
    """The projector, which every tensor-parallel rank holds whole: norm and two linears."""
    inputs, hidden = projector_input(vision), vision.projector_hidden_size
    return Parameters(replicated=inputs + inputs * hidden + hidden * output_size)


def projector_adapter_parameters(vision: VisionConfig, output_size: int, lora: LoraConfig) -> Parameters:
    """The adapters of the projector's two linears, whole on every rank; none unless it is among the targets."""
    if PROJECTOR_TARGET not in lora.targets:
        return Parameters()
    widths = projector_input(vision) + 2 * vision.projector_hidden_size + output_size
    return Parameters(replicated=lora.rank * widths)


def language_parameters(model: ModelConfig) -> Parameters:
    """The whole language model."""
    layers = (layer_parameters(model, symbol) for symbol in "".join(model.stages))
    tables = embedding_parameters(model)
    if not model.tie_embeddings:
        tables += embedding_parameters(model)
    return sum(layers, Parameters()) + tables + final_norm_parameters(model)
