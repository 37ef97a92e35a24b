"""What a layer must remember for its backward pass: the tensors, their sizes, and which of them ranks share.

Two sets: ``torch`` is the plain torch implementation as autograd runs it on a CPU (tests hold it equal to what autograd
saves); ``fused`` has the kernels of causal-conv1d, mamba_ssm and Transformer Engine for convolution, scan and
attention, read off their code and not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.layers import (
    attention_widths,
    exchanged_channels,
    mamba_channels,
    mamba_inner,
    mamba_rows,
)
from hybridprune_megatron.cost.vision import projector_input

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, VisionConfig

_FP32 = 4
#: Decays that the plain torch scan computes at once: as in ops/ssd_blocks.py, which imports torch.
SCAN_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept until backward.

    Attributes:
        name: what it is.
        numbers: numbers a token (of the tokens that the owner of the list names).
        width: bytes of a number.
        split: "channels" over tensor-parallel ranks, "sequence" over them under sequence parallelism, "" not at all.
        core: inside of what selective recomputation computes again: convolution and scan, attention's core.
    """

    name: str
    numbers: float
    width: int
    split: str = ""
    core: bool = False

    def bytes(self, tokens: int, tensor: int = 1, sequence_parallel: bool = False) -> int:
        """Bytes on one rank."""
        shared = self.split == "channels" or (self.split == "sequence" and sequence_parallel)
        return round(self.numbers * self.width * tokens / (tensor if shared else 1))


def total_bytes(kept: Iterable[Kept], tokens: int, tensor: int = 1, sequence_parallel: bool = False) -> int:
    """Bytes of a list of tensors on one rank."""
    return sum(each.bytes(tokens, tensor, sequence_parallel) for each in kept)


def layer_activations(model: ModelConfig, symbol: str, width: int, fused: bool) -> list[Kept]:
    """What one layer keeps, its input first.

    Args:
        model: dimensions.
        symbol: M, *, - or E.
        width: bytes of an activation.
        fused: kernels of a GPU, else plain torch.
    """
    if symbol == "M":
        return _norm(model, width) + _mamba(model, width, fused)
    if symbol == "*":
        return _norm(model, width) + _attention(model, width, fused)
    if symbol == "-":
        # relu(x) and relu(x)^2, which is the second linear's input.
        inside = [Kept(name, model.ffn_hidden_size, width, "channels") for name in ("relu", "squared")]
        return _norm(model, width) + inside
    assert symbol == "E", symbol
    return _norm(model, width) + _experts(model, width)


def context_activations(model: ModelConfig, symbol: str, width: int, tensor: int, context: int) -> list[Kept]:
    """What one layer keeps beside ``layer_activations`` under context parallelism, per token of a rank's shard.

    Args:
        model: dimensions.
        symbol: M, * or -.
        width: bytes of an activation.
        tensor: ranks that share the heads.
        context: ranks that share the sequence; 1: nothing.
    """
    if context == 1 or symbol not in "M*":
        return []
    if symbol == "*":
        return [Kept("gathered k, v", 2 * attention_widths(model)[1] * context, width, "channels", core=True)]
    # A convolution's input and output for every group that goes to several ranks.
    repeated = max(0, context - model.mamba_num_groups // tensor)
    return [
        Kept("exchanged x, B, C, dt", exchanged_channels(model, tensor, context), width),
        Kept("repeated B, C", 2 * 2 * model.mamba_state_dim * repeated, width, core=True),
    ]


def scan_workspace(model: ModelConfig, tokens: int, tensor: int) -> int:
    """Bytes of what the plain torch scan's backward computes of one block of chunks, all of it in fp32.

    Decays, their products and the gradient of these, one number for every pair of tokens of a chunk and head; five
    tensors as wide as x, four as wide as B, and the gradients of the states.

    Args:
        model: dimensions.
        tokens: of the layer.
        tensor: ranks that share the heads.
    """
    heads, chunk = model.mamba_num_heads // tensor, model.mamba_chunk_size
    groups = model.mamba_num_groups // tensor
    inner, state = heads * model.mamba_head_dim, model.mamba_state_dim
    block = min(tokens, chunk * max(1, SCAN_BLOCK_ELEMENTS // (heads * chunk * chunk)))
    numbers = 3 * heads * chunk + 5 * inner + 4 * groups * state + 2 * inner * state / chunk
    return round(_FP32 * numbers * block)


def layer_input(model: ModelConfig, width: int) -> Kept:
    """The residual stream in front of a layer: all that is kept of it under full recomputation."""
    return Kept("input", model.hidden_size, width, "sequence")


def _norm(model: ModelConfig, width: int) -> list[Kept]:
    return [
        layer_input(model, width),
        Kept("rsqrt", 1, _FP32, "sequence"),
        Kept("normed", model.hidden_size, width, "sequence"),
    ]


def _mamba(model: ModelConfig, width: int, fused: bool) -> list[Kept]:
    inner, channels, heads = mamba_inner(model), mamba_channels(model), model.mamba_num_heads
    ends = [
        Kept("in_proj output", mamba_rows(model), width, "channels"),
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
        # The scan works in fp32; a bf16 run goes on with a copy of its output.
        Kept("x, B, C", channels, _FP32, "channels", core=True),
        Kept("scan output", inner, _FP32, "channels", core=width < _FP32),
        *([Kept("y", inner, width, "channels")] if width < _FP32 else []),
        # Those between chunks; each of the scan's blocks begins with one more, which is left out.
        Kept("states", states, _FP32, "channels", core=True),
    ]


def _attention(model: ModelConfig, width: int, fused: bool) -> list[Kept]:
    queries, keys = attention_widths(model)
    kept = [
        # Keys and values are views of the projection; the queries of interleaved groups are copied out of it.
        Kept("q, k, v", queries + 2 * keys, width, "channels"),
        Kept("q", queries, width, "channels"),
        Kept("log-sum-exp", model.num_attention_heads, _FP32, "channels", core=True),
        Kept("output", queries, width, "channels"),
    ]
    # Plain torch attends sample by sample and concatenates.
    return kept if fused else [*kept, Kept("outputs by sample", queries, width, "channels", core=True)]


def _experts(model: ModelConfig, width: int) -> list[Kept]:
    """Even loads: a rank's part of the sequence visits as many experts as other ranks' tokens visit its own."""
    experts = model.experts
    assert experts is not None, "an E layer comes with its experts' sizes"
    inner, visits = experts.latent_size or model.hidden_size, experts.experts_per_token
    latent = [Kept(name, inner, width, "sequence") for name in ("latent", "latent sum")]
    return [
        Kept("router", experts.num_experts, _FP32, "sequence"),
        *(latent if experts.latent_size is not None else []),
        Kept("permuted", visits * inner, width, "sequence"),
        *(Kept(name, visits * experts.ffn_hidden_size, width, "sequence") for name in ("relu", "squared", "weighted")),
        Kept("expert outputs", visits * inner, width, "sequence"),
        *(Kept(name, experts.shared_ffn_hidden_size, width, "channels") for name in ("shared relu", "shared squared")),
    ]


def head_activations(model: ModelConfig, width: int) -> list[Kept]:
    """The output layer with its loss, per row that has one: hidden state and exponentials of the logits in fp32."""
    return [Kept("rows", model.hidden_size, width), Kept("exp(logits)", model.vocab_size, _FP32, "channels")]


def projector_activations(vision: VisionConfig, width: int) -> list[Kept]:
    """The projector, per visual token; every rank runs it whole."""
    inputs, hidden = projector_input(vision), vision.projector_hidden_size
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
