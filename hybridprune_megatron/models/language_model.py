"""The hybrid language model: megatron's ``HybridModel`` over a packed sequence that gets shorter with depth."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.models.stack import Reduction
from hybridprune_megatron.models.stage_cut import ORIGIN_COLUMNS, split_origin, with_origin


class ReductionHybridModel(HybridModel):
    """Embedding, reduction-aware stack, output layer. Checkpoint keys are ``HybridModel``'s.

    Args:
        args, kwargs: as for ``HybridModel``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The caller puts frames between the embedded tokens, so the whole sequence is embedded on every rank and
        # sharded after.
        super().__init__(*args, **kwargs, scatter_embedding_sequence_parallel=False)
        if self.post_process:
            # Only the rows with a loss pass the output layer; they are cut from the gathered sequence.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def embed(self, input_ids: Tensor) -> Tensor:
        """[L] token ids to [L, 1, hidden], the whole sequence on every tensor-parallel rank."""
        return self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)

    def forward(
        self,
        embeddings: Tensor | None,
        layout: TokenLayout,
        reduction: Reduction | None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        trace: list[TokenLayout] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """Hidden states, logits or losses.

        Args:
            embeddings: [L, 1, hidden] of the whole packed sequence on the first stage, None on others.
            layout: the packed sequence before any reduction; on the first stage what enters the first layer.
            reduction: what to drop; None: nothing.
            rows: int64 [R], rising, tokens of the unreduced packed sequence whose logits are wanted; they must survive
                (text always does). None: all tokens that are left. Under context parallelism each rank gets its part.
            labels: int64 [R] targets of these rows; None asks for logits.
            trace: gets the layout that enters every layer.

        Returns:
            On the last stage float32 [R] losses, or [R, vocabulary of this rank] logits; else what crosses the stage
            cut. And the last layout.
        """
        if embeddings is not None and self.training and self.config.recompute_granularity is not None:
            # Recomputation records nothing of a layer whose input asks for no gradient, as frozen embeddings do not.
            embeddings = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
        decoder = self.decoder
        if embeddings is not None:
            hidden = decoder.scattered(decoder.shard.cut(embeddings))
        else:
            hidden, layout = self._received(layout, reduction)
        hidden, layout = decoder(hidden, layout, reduction, trace)
        if not self.post_process:
            return with_origin(hidden, decoder.scattered(decoder.shard.cut(layout.origin))), layout
        hidden = decoder.gathered(hidden)
        if rows is not None:
            index = torch.searchsorted(layout.origin, rows)
            hidden, dealt = decoder.shard.rows_dealt(hidden, index, layout.num_tokens)
            labels = labels[dealt] if labels is not None else None
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if labels is None:
            return logits.squeeze(1), layout
        return self.compute_language_model_loss(labels.unsqueeze(0), logits).squeeze(0).float(), layout

    def _received(self, layout: TokenLayout, reduction: Reduction | None) -> tuple[Tensor, TokenLayout]:
        """What the stage before sent: hidden states, and the layout of the tokens that are left.

        Args:
            layout: the packed sequence before any reduction.
            reduction: what was dropped.
        """
        decoder = self.decoder
        hidden, origin = split_origin(decoder.input_tensor)
        with torch.no_grad():
            origin = decoder.shard.joined(decoder.gathered(origin))
        return hidden, layout.taken(origin, self._entering(layout, reduction))

    def _entering(self, layout: TokenLayout, reduction: Reduction | None) -> tuple[int, ...]:
        """Visual tokens of every sample that enter this stage."""
        if reduction is None:
            return layout.original_visual_counts
        by_layer = reduction.counts_by_layer(layout, self.decoder.multiple_of)
        return by_layer[self.decoder.layers[0].layer_number - 1]

    def input_shape(self, layout: TokenLayout, reduction: Reduction | None) -> tuple[int, int, int]:
        """Shape of what crosses the cut in front of this stage.

        Args:
            layout: the packed sequence before any reduction.
            reduction: what to drop; None: nothing.
        """
        text = layout.num_tokens - sum(layout.visual_counts)
        tokens = text + sum(self._entering(layout, reduction))
        shares = self.decoder.shard.size * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)
        return tokens // shares, 1, self.config.hidden_size + ORIGIN_COLUMNS
