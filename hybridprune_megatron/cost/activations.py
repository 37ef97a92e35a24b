"""What a layer must remember for its backward pass: the tensors, their sizes, and which of them ranks share.

Two sets: ``torch`` is the plain torch implementation as autograd runs it on a CPU (tests hold it equal to what autograd
saves); ``fused`` has the kernels of causal-conv1d, mamba_ssm and Transformer Engine for convolution, scan and
attention, read off their code and not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hybridprune_megatron.layers.kind import Kept
from hybridprune_megatron.layers.kinds import KINDS

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, VisionConfig

_FP32 = 4


def total_bytes(kept: Iterable[Kept], tokens: int, tensor: int = 1, sequence_parallel: bool = False) -> int:
    """Bytes of a list of tensors on one rank."""
    return sum(each.bytes(tokens, tensor, sequence_parallel) for each in kept)


def layer_activations(model: ModelConfig, symbol: str, width: int, fused: bool) -> list[Kept]:
    """What one layer keeps, its input first.

    Args:
        width: bytes of an activation.
        fused: kernels of a GPU, else plain torch.
    """
    return _norm(model, width) + KINDS[symbol].activations(model, width, fused)


def context_activations(model: ModelConfig, symbol: str, width: int, tensor: int, context: int) -> list[Kept]:
    """What one layer keeps besides ``layer_activations`` where context ranks share the sequence."""
    return KINDS[symbol].context_activations(model, width, tensor, context) if context > 1 else []


def layer_input(model: ModelConfig, width: int) -> Kept:
    """The residual stream before a layer: all that is kept of it under full recomputation."""
    return Kept("input", model.hidden_size, width, "sequence")


def _norm(model: ModelConfig, width: int) -> list[Kept]:
    return [
        layer_input(model, width),
        Kept("rsqrt", 1, _FP32, "sequence"),
        Kept("normed", model.hidden_size, width, "sequence"),
    ]


def head_activations(model: ModelConfig, width: int) -> list[Kept]:
    """The output layer with its loss, per row that has one: hidden state and exponentials of the logits in fp32."""
    return [Kept("rows", model.hidden_size, width), Kept("exp(logits)", model.vocab_size, _FP32, "channels")]


def projector_activations(vision: VisionConfig, width: int) -> list[Kept]:
    """The projector, per visual token; every rank runs it whole."""
    inputs, hidden = vision.projector_input_size, vision.projector_hidden_size
    return [
        Kept("input", inputs, width),
        Kept("normed", inputs, width),
        Kept("relu", hidden, width),
        Kept("squared", hidden, width),
    ]


def block_activations(vision: VisionConfig, width: int) -> list[Kept]:
    """One block of the tower, per token inside it; every rank runs it whole."""
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    names = ("input", "normed", "q", "k", "v", "attended", "projected", "middle", "normed again", "fc2 output")
    return [
        *(Kept(name, hidden, width) for name in names),
        # Mean and scale of two norms.
        Kept("norm statistics", 4, width),
        Kept("log-sum-exp", vision.num_attention_heads, _FP32),
        Kept("fc1 output", ffn, width),
        Kept("gelu", ffn, width),
    ]


def block_peak(vision: VisionConfig) -> int:
    """Numbers a token that live at once while a frozen tower runs: the widest moment of a block.

    The embedded patches (which the tower's forward holds on to), residual and normed input stand beside q, k, v, the
    attended values and their projection, or beside both sides of GELU.
    """
    return 3 * vision.hidden_size + max(5 * vision.hidden_size, 2 * vision.intermediate_size)
