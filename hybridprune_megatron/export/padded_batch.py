"""A padded batch as ``generate`` gives it, and the packed sequence that the layers take.

Shape letters: B samples, L columns of a padded batch, R real tokens packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.method.layout import SampleLayout, TokenKind, TokenLayout


def derive_token_kinds(input_ids: Tensor, mask: Tensor, config: HybridPruneConfig) -> Tensor:
    """Guesses token kinds from ids; the processor's ``token_kinds`` are exact and go first.

    FRAME are the image tokens. QUESTION is the plain text of the first user turn after its last frame; if there is
    none, the turn's plain text before its first frame, which then includes the role name and that frame's text
    (ids cannot tell them apart). Without turn tokens, the whole row is one turn.

    Args:
        input_ids: int64 [B, L].
        mask: bool [B, L], false for padding.
        config: the model's special tokens.

    Returns:
        uint8 [B, L] on the host.
    """
    ids, real = input_ids.cpu(), mask.cpu()
    kinds = torch.full(ids.shape, int(TokenKind.TEXT), dtype=torch.uint8)
    if config.image_token_id is None:
        return kinds
    frames = (ids == config.image_token_id) & real
    kinds[frames] = int(TokenKind.FRAME)
    special = torch.tensor([config.image_token_id, *config.special_token_ids])
    plain = real & ~torch.isin(ids, special)
    for row in range(len(ids)):
        if not frames[row].any():
            continue
        turns = torch.nonzero((ids[row] == config.turn_token_id) & real[row]).flatten().tolist()
        start = turns[0] if turns else 0
        stop = turns[1] if len(turns) > 1 else ids.shape[1]
        shown = torch.nonzero(frames[row, start:stop]).flatten()
        if not len(shown):
            continue
        first, last = start + int(shown[0]), start + int(shown[-1])
        question = torch.zeros_like(plain[row])
        question[last + 1 : stop] = plain[row, last + 1 : stop]
        if not question.any():
            question[start:first] = plain[row, start:first]
        kinds[row, question] = int(TokenKind.QUESTION)
    return kinds


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch, packed: its real tokens one sample after another.

    Attributes:
        input_ids: int64 [R].
        layout: of the packed tokens before any reduction.
        packed_index: int64 [B, L] index of every column in the packed sequence, -1 for padding.
    """

    input_ids: Tensor
    layout: TokenLayout
    packed_index: Tensor

    @staticmethod
    # Bookkeeping on the host: torch.compile would trace it anew for every prompt.
    @torch.compiler.disable
    def of(
        config: HybridPruneConfig,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_kinds: Tensor | None,
        frames_per_video: Tensor | None,
    ) -> PaddedBatch:
        """Packs; arguments as for ``HybridPruneForCausalLM.forward``.

        Raises:
            ValueError: a row is all padding, or the kinds are of other ids.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = mask.sum(1).tolist()
        if not min(lengths):
            raise ValueError(f"row {lengths.index(0)} of the batch is all padding: every row needs a token")
        if token_kinds is None:
            kinds = derive_token_kinds(input_ids, mask, config)
        else:
            missing = input_ids.shape[1] - token_kinds.shape[1]
            kinds = nn.functional.pad(token_kinds.cpu().to(torch.uint8), (0, missing), value=int(TokenKind.ANSWER))
        frames = (kinds == int(TokenKind.FRAME)).to(input_ids.device)
        image = config.image_token_id
        if image is not None and not torch.equal(frames, (input_ids == image) & mask):
            raise ValueError(
                "token_kinds and input_ids differ: exactly the image tokens are FRAME; use the processor's"
            )
        packed_index = (torch.cumsum(mask.flatten(), 0).view_as(mask) - 1).masked_fill(~mask, -1)
        per_frame = None if config.vision is None else config.tokens_per_frame
        videos = [None] * len(kinds) if frames_per_video is None else frames_per_video.tolist()
        rows = [row[shown].tolist() for row, shown in zip(kinds, mask.cpu())]
        samples = [SampleLayout.from_kinds(row, per_frame, counts) for row, counts in zip(rows, videos, strict=True)]
        return PaddedBatch(input_ids[mask], TokenLayout.from_samples(samples, input_ids.device), packed_index)

    def find(self, layout: TokenLayout, logits_to_keep: int | Tensor) -> tuple[Tensor, Tensor]:
        """Where columns are in what is left of the packed sequence.

        Args:
            layout: of what is left.
            logits_to_keep: number of last columns, or their indices; 0: all.

        Returns:
            bool [B, columns], whether the column's token is left, and int64 indices of those that are.
        """
        keep = kept_columns(logits_to_keep, self.packed_index.shape[1])
        rows = self.packed_index[:, keep].contiguous().to(layout.origin.device)
        where = torch.searchsorted(layout.origin, rows).clamp(max=len(layout.origin) - 1)
        left = layout.origin[where] == rows
        return left, where[left]


def kept_columns(logits_to_keep: int | Tensor, columns: int) -> slice | Tensor:
    """What picks the columns whose logits are wanted.

    Args:
        logits_to_keep: number of last columns, or their indices; 0: all.
        columns: how many a call has.

    Raises:
        ValueError: there are no such columns.
    """
    if isinstance(logits_to_keep, int):
        allowed = logits_to_keep >= 0
    else:
        allowed = bool(((logits_to_keep >= -columns) & (logits_to_keep < columns)).all())
    if not allowed:
        raise ValueError(
            f"logits_to_keep={' '.join(str(logits_to_keep).split()):.60} for {columns} columns: give how many last "
            "ones, 0 for all, or indices of columns"
        )
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
