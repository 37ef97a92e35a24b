"""What travels with the hidden states of a packed sequence through the layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.signals import Signals
from hybridprune_megatron.models.context import ContextShard


@dataclass(kw_only=True)
class LayerPacking(PackedSeqParams):
    """Megatron's ``packed_seq_params`` for one layer of one forward pass, rebuilt after every drop.

    A layer that is asked to score writes its result here; the stack reads it and throws the object away, so nothing of
    it lives on in a module (recomputation and interleaved micro-batches would read somebody else's).

    Attributes:
        layout: the tokens that enter this layer.
        sample_index: int32 [L] sample of every token.
        sample_position: int64 [L] distance of every token from the start of its sample, counting present tokens only.
        scorer: asks the mixer for scores; None: nobody wants them.
        dt_filter: share of its visual tokens' steps that a Mamba head with a long memory keeps; None: all.
        shard: this rank's part of the packed sequence; the indices above are of all of it.
        scores: float32 [V], written by the mixer: over this rank's heads.
        pooling: written by the mixer: "mean" where they are the mean over its heads, else they are the highest.
        heads_group: written by the mixer: the ranks that share its heads; None: the tensor-parallel ones.
    """

    layout: TokenLayout
    sample_index: Tensor
    sample_position: Tensor
    scorer: Scorer | None = None
    dt_filter: float | None = None
    shard: ContextShard | None = None
    scores: Tensor | None = None
    pooling: str = "mean"
    heads_group: ProcessGroup | None = None

    def keep(self, scorer: Scorer, signals: Signals, layer: int) -> None:
        """Writes the scores of a layer (0-based) from what its mixer has computed."""
        self.scores = scorer.score(signals, self.layout, layer)
        self.pooling = scorer.pooling(signals.kind)

    @property
    def asking(self) -> Scorer | None:
        """The scorer, until the mixer has written its scores: not again where activations are recomputed."""
        return self.scorer if self.scores is None else None


def pack_for_layer(
    layout: TokenLayout,
    scorer: Scorer | None,
    dt_filter: float | None,
    previous: LayerPacking | None,
    shard: ContextShard | None = None,
) -> LayerPacking:
    """Packing of a layer; device indices are shared with the layer before as long as nothing was dropped."""
    if previous is not None and previous.layout is layout:
        sample_index, position = previous.sample_index, previous.sample_position
        seq_idx = previous.seq_idx
    else:
        sample_index = layout.sample_index()
        position = layout.sample_position(sample_index)
        seq_idx = sample_index.unsqueeze(0)
    longest = max(layout.sample_lengths)
    packing = LayerPacking(
        qkv_format="thd",
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_kv=layout.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        layout=layout,
        sample_index=sample_index,
        sample_position=position,
        scorer=scorer,
        dt_filter=dt_filter,
        shard=shard,
    )
    packing.seq_idx = seq_idx
    return packing
