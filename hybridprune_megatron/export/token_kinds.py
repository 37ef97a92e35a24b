"""What every token of a padded batch is, where the processor did not say."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.method.layout import TokenKind


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
