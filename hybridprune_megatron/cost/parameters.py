"""Parameters of every part of the model, as one rank of a tensor-parallel group holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET
from hybridprune_megatron.layers.kind import Parameters
from hybridprune_megatron.layers.kinds import KINDS

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, VisionConfig
    from hybridprune_megatron.config.tuning_schema import LoraConfig

_COLOURS = 3


def layer_parameters(model: ModelConfig, symbol: str) -> Parameters:
    """One layer with its norm."""
    return KINDS[symbol].parameters(model)


def adapter_parameters(model: ModelConfig, symbol: str, lora: LoraConfig) -> Parameters:
    """The low-rank adapters of one layer: A [r, in] and B [out, r] of every linear that has one.

    Ranks split B of a column-parallel linear and A of a row-parallel one; the other half lies on every rank, and its
    side of the linear is the residual stream.
    """
    adapted = [each for each in KINDS[symbol].linears(model) if each.name in lora.targets]
    return sum((Parameters(lora.rank * each.width, lora.rank * model.hidden_size) for each in adapted), Parameters())


def embedding_parameters(model: ModelConfig) -> Parameters:
    """The token embedding; the output layer has as many unless they are tied."""
    return Parameters(model.vocab_size * model.hidden_size)


def final_norm_parameters(model: ModelConfig) -> Parameters:
    """The norm before the output layer."""
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
    inputs, hidden = vision.projector_input_size, vision.projector_hidden_size
    return Parameters(replicated=inputs + inputs * hidden + hidden * output_size)


def projector_adapter_parameters(vision: VisionConfig, output_size: int, lora: LoraConfig) -> Parameters:
    """The adapters of the projector's two linears, whole on every rank; none unless it is among the targets."""
    if PROJECTOR_TARGET not in lora.targets:
        return Parameters()
    widths = vision.projector_input_size + 2 * vision.projector_hidden_size + output_size
    return Parameters(replicated=lora.rank * widths)


def language_parameters(model: ModelConfig) -> Parameters:
    """The whole language model."""
    layers = (layer_parameters(model, symbol) for symbol in "".join(model.stages))
    tables = embedding_parameters(model)
    if not model.tie_embeddings:
        tables += embedding_parameters(model)
    return sum(layers, Parameters()) + tables + final_norm_parameters(model)
