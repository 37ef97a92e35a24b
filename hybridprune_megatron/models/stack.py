"""The decoder stack: megatron's ``HybridStack`` that drops visual tokens between its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.plan import Plan
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass, RunLayer
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.sums import averaged
from hybridprune_megatron.models.context import ContextShard
from hybridprune_megatron.models.fp8 import layer_context, pass_context, recomputed, row_tile
from hybridprune_megatron.models.packed import LayerPacking, pack_for_layer
from hybridprune_megatron.models.stage_cut import ORIGIN_COLUMNS, split_origin


class ReductionStack(HybridStack):
    """Hybrid stack over packed samples; a layer whose successor is to see fewer visual tokens scores them.

    It is also where rows lie (``method.reduction_pass.Rows``): in parts on tensor- and context-parallel ranks.

    Args:
        submodules: layer specs.
        final_norm: norm before the output layer (the stock stack can only build Transformer Engine's).
        kwargs: as for ``HybridStack``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: type[nn.Module],
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, **(kwargs | {"post_layer_norm": False}))
        self.shard = ContextShard(self.pg_collection.cp)
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    @property
    def multiple_of(self) -> int:
        """What the length of a packed sequence must divide by in every layer.

        Ranks share it evenly, and with FP8 the part of each has whole tiles: ``Config.length_multiple`` without the
        reduction's own setting.
        """
        sharing = self.tp_group.size() if self.config.sequence_parallel else 1
        return math.lcm(self.shard.multiple_of * sharing, self.shard.size * sharing * row_tile(self.config))

    @property
    def local_chunks(self) -> int:
        """Chunks of a packed sequence within which tokens compete where the choice is local."""
        return self.shard.multiple_of

    def pass_of(
        self, reduction: Reduction | None, layout: TokenLayout, by_sample: Sequence[Sequence[float]] | None = None
    ) -> ReductionPass:
        """Dropping in one forward pass, aligned to what the ranks share.

        Args:
            reduction: what to drop; None: nothing.
            layout: the packed sequence before any reduction.
            by_sample: a retention of its own for every sample; None: the reduction's for all.
        """
        return ReductionPass.of(reduction, layout, self.multiple_of, by_sample)

    def forward(
        self,
        hidden_states: Tensor | None,
        layout: TokenLayout,
        dropping: ReductionPass,
        trace: list[TokenLayout] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """Runs the layers and drops visual tokens between them.

        Args:
            hidden_states: [L, 1, hidden], or this rank's part under context and sequence parallelism; None: what the
                stage before sent.
            layout: the packed sequence that enters the first layer of the model.
            dropping: what is dropped in this pass.
            trace: gets the layout that enters every layer, for measuring.

        Returns:
            Hidden states of the tokens that are left and their layout.
        """
        if hidden_states is None:
            hidden_states, layout = self._received(layout, dropping)
        layers = [layer.layer_number - 1 for layer in self.layers]
        with pass_context(self.config):
            run = self.layer_runner(dropping.dt_filter)
            hidden_states, layout = dropping.walk(layers, hidden_states, layout, run, self, trace)
        return self.finished(hidden_states), layout

    def layer_runner(self, dt_filter: float | None = None) -> RunLayer:
        """Runs this stage's layers one by one, for ``ReductionPass.walk``.

        Args:
            dt_filter: see ``Reduction``.
        """
        layers = {layer.layer_number - 1: layer for layer in self.layers}
        packing: LayerPacking | None = None

        def run(index: int, hidden: Tensor, layout: TokenLayout, scorer: Scorer | None) -> tuple[Tensor, Tensor | None]:
            nonlocal packing
            packing = pack_for_layer(layout, scorer, dt_filter, packing, self.shard)
            hidden = self._run_layer(layers[index], hidden, packing)
            return hidden, _over_heads(packing, packing.heads_group or self.tp_group)

        return run

    def finished(self, hidden_states: Tensor) -> Tensor:
        """What leaves this stage of the hidden states after its last layer."""
        if self.post_process:
            hidden_states = self.final_norm(hidden_states)
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)

    def input_shape(self, layout: TokenLayout, dropping: ReductionPass) -> tuple[int, int, int]:
        """Shape of what crosses the pipeline boundary before this stage.

        Args:
            layout: the packed sequence that enters the first layer of the model.
            dropping: what is dropped in this pass.
        """
        tokens = layout.num_tokens - sum(layout.visual_counts) + sum(self._entering(layout, dropping))
        shares = self.shard.size * (self.tp_group.size() if self.config.sequence_parallel else 1)
        return tokens // shares, 1, self.config.hidden_size + ORIGIN_COLUMNS

    def _entering(self, layout: TokenLayout, dropping: ReductionPass) -> tuple[int, ...]:
        """Visual tokens of every sample that enter this stage."""
        return dropping.entering(self.layers[0].layer_number - 1, layout)

    def _received(self, layout: TokenLayout, dropping: ReductionPass) -> tuple[Tensor, TokenLayout]:
        """What the stage before sent: hidden states, and the layout of the tokens that are left."""
        hidden_states, origin = split_origin(self.input_tensor)
        with torch.no_grad():
            origin = self.shard.joined(self.gathered(origin))
        return hidden_states, layout.taken(origin, self._entering(layout, dropping))

    def _run_layer(self, layer: Any, hidden_states: Tensor, packing: Any) -> Tensor:
        """One layer, its activations recomputed in backward if configured.

        Selection stays outside of what is recomputed: the plan of the first pass is the only one.
        """

        def run(hidden: Tensor) -> Tensor:
            # Opened inside of what is recomputed, so that backward's pass runs in it too.
            with layer_context(self.config, layer.layer_number):
                output = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=packing)
            return output[0] if isinstance(output, tuple) else output

        if self.config.recompute_granularity == "full" and self.training:
            return recomputed(self.config, self.tp_group, run, hidden_states)
        return run(hidden_states)

    def whole(self, hidden: Tensor) -> Tensor:
        """See ``Rows``: gathered over tensor-parallel ranks under sequence parallelism, joined over context ranks."""
        return self.shard.joined(self.gathered(hidden))

    def part(self, whole: Tensor) -> Tensor:
        """See ``Rows``."""
        return self.scattered(self.shard.cut(whole))

    def taken(self, hidden: Tensor, plan: Plan, length: int, stay: bool) -> Tensor:
        """See ``Rows``: under sequence parallelism this rank's part is gathered, cut and scattered."""
        hidden = self.gathered(hidden)
        if self.shard.size == 1:
            left = plan.take(hidden)
        else:
            move = self.shard.kept_here if stay else self.shard.exchange
            left = move(hidden, plan.kept, length)
        return self.scattered(left)

    def gathered(self, hidden_states: Tensor) -> Tensor:
        """All rows of this context-parallel rank, from those of this tensor-parallel rank."""
        if not self.config.sequence_parallel:
            return hidden_states
        # Every rank continues with the same rows, so backward may split the gradient instead of summing it over ranks.
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
        )

    def scattered(self, hidden_states: Tensor) -> Tensor:
        """The reverse of ``gathered``."""
        if not self.config.sequence_parallel:
            return hidden_states
        return scatter_to_sequence_parallel_region(hidden_states, group=self.tp_group)


def _over_heads(packing: LayerPacking, group: torch.distributed.ProcessGroup) -> Tensor | None:
    """Scores over all heads from those over each rank's heads, of which all have as many."""
    scores = packing.scores
    if scores is None or group.size() == 1:
        return scores
    if packing.pooling != "mean":
        torch.distributed.all_reduce(scores, torch.distributed.ReduceOp.MAX, group=group)
        return scores
    return _mean_over_ranks(scores, group) if len(scores) else scores


def _mean_over_ranks(scores: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[V] mean of what every rank has, as many bytes as an all-reduce.

    A ring adds the ranks up in an order that changes from place to place, and equal tokens would no longer score alike.
    Here every rank adds up a share of the places, all in the same order.
    """
    size = group.size()
    share = -(-len(scores) // size)
    filled = torch.nn.functional.pad(scores, (0, share * size - len(scores)))
    parts = torch.empty_like(filled)
    torch.distributed.all_to_all_single(parts, filled, group=group)
    torch.distributed.all_gather_into_tensor(filled, averaged(parts.view(size, share), 0), group=group)
    return filled[: len(scores)]
