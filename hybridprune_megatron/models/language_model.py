"""The hybrid language model: megatron's ``HybridModel`` over a packed sequence that gets shorter with depth."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.models.stage_cut import with_origin


def likeliest_tokens(logits: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The token that greedy decoding would write.

    Args:
        logits: [R, vocabulary of this rank].
        group: the tensor-parallel ranks.

    Returns:
        int64 [R], the same on every one of these ranks.
    """
    best, token = logits.max(-1, keepdim=True)
    if group.size() > 1:
        token = token + group.rank() * logits.shape[-1]
        best, token = (gather_from_tensor_model_parallel_region(each, group=group) for each in (best, token))
        token = token.gather(-1, best.argmax(-1, keepdim=True))
    return token.squeeze(-1)


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
        dropping: ReductionPass,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        trace: list[TokenLayout] | None = None,
        judged: bool = False,
    ) -> tuple[Tensor, TokenLayout]:
        """Hidden states, logits or losses.

        Args:
            embeddings: [L, 1, hidden] of the whole packed sequence on the first stage, None on others.
            layout: the packed sequence before any reduction; on the first stage what enters the first layer.
            dropping: what is dropped in this pass (``decoder.pass_of``).
            rows: int64 [R], rising, tokens of the unreduced packed sequence whose logits are wanted; they must survive
                (text always does). None: all tokens that are left. Under context parallelism each rank gets its part.
            labels: int64 [R] targets of these rows; None asks for logits.
            trace: gets the layout that enters every layer.
            judged: asks for losses and whether each label is the likeliest token.

        Returns:
            On the last stage float32 [R] losses, or [R, vocabulary of this rank] logits; else what crosses the stage
            cut. And the last layout. With ``judged`` float32 [2, R] of all rows, losses and 1 or 0; zeros in rows that
            another context-parallel rank has.
        """
        if embeddings is not None and self.training and self.config.recompute_granularity is not None:
            # Recomputation records nothing of a layer whose input asks for no gradient, as frozen embeddings do not.
            embeddings = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
        decoder = self.decoder
        hidden = decoder.scattered(decoder.shard.cut(embeddings)) if embeddings is not None else None
        hidden, layout = decoder(hidden, layout, dropping, trace)
        if not self.post_process:
            return with_origin(hidden, decoder.scattered(decoder.shard.cut(layout.origin))), layout
        logits, dealt = self.row_logits(hidden, layout, rows)
        if labels is None:
            return logits.squeeze(1), layout
        own = labels[dealt]
        # First: megatron's cross entropy overwrites fp32 logits.
        right = likeliest_tokens(logits.squeeze(1), self.pg_collection.tp) == own if judged else None
        losses = self.compute_language_model_loss(own.unsqueeze(0), logits).squeeze(0).float()
        if right is None:
            return losses, layout
        whole = losses.new_zeros(2, len(labels))
        whole[:, dealt] = torch.stack([losses, right.float()])
        return whole, layout

    def row_logits(self, hidden: Tensor, layout: TokenLayout, rows: Tensor | None) -> tuple[Tensor, slice]:
        """Logits from what leaves the last stage's decoder.

        Args:
            hidden: this rank's part of it.
            layout: of the tokens that are left.
            rows: as for ``forward``.

        Returns:
            [R, 1, vocabulary of this rank], and which of the rows these are.
        """
        hidden, dealt = self.decoder.gathered(hidden), slice(None)
        if rows is not None:
            index = torch.searchsorted(layout.origin, rows)
            hidden, dealt = self.decoder.shard.rows_dealt(hidden, index, layout.num_tokens)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0], dealt
