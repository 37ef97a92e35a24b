"""The hybrid language model: megatron's ``HybridModel`` over a packed sequence that gets shorter with depth."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.models.stack import Reduction


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
            embeddings: [L, 1, hidden] on the first stage.
            layout: the packed sequence that enters the first layer.
            reduction: what to drop; None: nothing.
            rows: int64 [R], rising, tokens of the unreduced packed sequence whose logits are wanted; they must survive
                (text always does). None: all tokens that are left.
            labels: int64 [R] targets of these rows; None asks for logits.
            trace: gets the layout that enters every layer.

        Returns:
            On the last stage float32 [R] losses, or [R, vocabulary of this rank] logits; else hidden states. And the
            last layout.
        """
        if embeddings is not None and self.training and self.config.recompute_granularity is not None:
            # Recomputation records nothing of a layer whose input asks for no gradient, as frozen embeddings do not.
            embeddings = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
        if self.config.sequence_parallel and embeddings is not None:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        hidden, layout = self.decoder(embeddings, layout, reduction, trace)
        if not self.post_process:
            return hidden, layout
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if rows is not None:
            hidden = hidden.index_select(0, torch.searchsorted(layout.origin, rows))
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if labels is None:
            return logits.squeeze(1), layout
        return self.compute_language_model_loss(labels.unsqueeze(0), logits).squeeze(0).float(), layout
