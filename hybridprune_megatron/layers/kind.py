"""What a kind of layer says of itself: one class per kind, which everything that is not a computation reads.

Letters: L tokens, D hidden size, H heads, P Mamba head width, G groups, N state size, Q tokens per chunk, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from hybridprune_megatron.layers.operations import Cost, elementwise

CONV_TAPS = 4


class ModelSizes(Protocol):
    """The dimensions of ``config.model_schema.ModelConfig`` that kinds of layers read."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int
    mamba_chunk_size: int
    experts: Any


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


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept until backward.

    Attributes:
        name: what it is.
        numbers: numbers per token (of the tokens that the owner of the list names).
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


@dataclass(frozen=True)
class Linear:
    """A linear between the residual stream and a layer's inside.

    Attributes:
        name: of the module, as ``tuning.lora.targets`` names it.
        width: of the other side.
        column: column-parallel (into the layer), else row-parallel (out of it).
    """

    name: str
    width: int
    column: bool


class LayerKind:
    """One kind of layer.

    Attributes:
        symbol: in a hybrid pattern; one that megatron-core's patterns know.
        name: in ``reduction.layers`` and in results.
        label: for people.
        colour: in figures; colour-blind safe (Okabe and Ito).
        huggingface: words for it in ``layers_block_type`` of a config.json, the first one is written.
        targets: linears that ``tuning.lora.targets`` may name.
        core: operations that selective recomputation computes again.
    """

    symbol: ClassVar[str]
    name: ClassVar[str]
    label: ClassVar[str]
    colour: ClassVar[str]
    huggingface: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ()
    core: ClassVar[frozenset[str]] = frozenset()

    @property
    def scores(self) -> bool:
        """Whether its mixer computes something that visual tokens can be scored with."""
        return type(self).score_sizes is not LayerKind.score_sizes

    def score_sizes(self, model: ModelSizes) -> tuple[int, int, int]:
        """Heads, groups that share keys, and width of a key, of a layer that scores."""
        raise NotImplementedError

    def split_sizes(self, model: ModelSizes) -> list[tuple[str, int]]:
        """Keys and values that ``parallel.tensor`` must divide; groups first, for they are the fewest."""
        return []

    def linears(self, model: ModelSizes) -> list[Linear]:
        """Those of ``targets``."""
        return []

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        """Key, size, and whether tensor parallelism splits it: inputs and outputs of the linears that run in FP8."""
        return []

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        """Operations and bytes by name.

        Args:
            lengths: tokens of every sample of the packed sequence.
            width: bytes of an activation or weight.
        """
        raise NotImplementedError

    def parameters(self, model: ModelSizes) -> Parameters:
        """With the norm before it."""
        raise NotImplementedError

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        """What it keeps for its backward pass besides its normed input.

        Args:
            width: bytes of an activation.
            fused: kernels of a GPU, else plain torch.
        """
        raise NotImplementedError

    def context_activations(self, model: ModelSizes, width: int, tensor: int, context: int) -> list[Kept]:
        """What it keeps as well under context parallelism, per token of a rank's shard.

        Args:
            width: bytes of an activation.
            tensor: ranks that share the heads.
            context: ranks that share the sequence, at least 2.
        """
        return []

    def workspace(self, model: ModelSizes, tokens: int, tensor: int) -> int:
        """Bytes that the plain torch implementation needs at once in its backward pass, besides what it keeps."""
        return 0

    def cache_bytes(self, model: ModelSizes, tokens: int, samples: int, width: int) -> int:
        """Bytes that decoding needs of it.

        Args:
            tokens: that entered it.
            samples: of them.
            width: bytes of an activation.
        """
        return 0


def norm_cost(tokens: int, hidden: int, width: int) -> Cost:
    """A norm over the residual stream."""
    return elementwise(2 * tokens * hidden + hidden, width)


def residual_cost(tokens: int, hidden: int, width: int) -> Cost:
    """The addition to the residual stream."""
    return elementwise(3 * tokens * hidden, width)
