"""The formulas of the fronts: how much a patch has changed, and which tokens merge.

Shape letters: V visual tokens, D width of the language model, F frames, P tokens per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.merge import Ranking, group_means, most_similar

# Tokens and frames compared at once, so that no second copy of all of them is made.
_BLOCK, _FRAME_BLOCK = 4096, 16


def feature_change(features: Tensor, layout: TokenLayout) -> Tensor:
    """float32 [V] ``1 - cos(E_tp, E_(t-1)p)``; inf in the first frame of a video.

    Args:
        features: [V, D] embeddings of the visual tokens.
        layout: the packed sequence.
    """
    before = patch_before(layout)
    change = [
        1 - nn.functional.cosine_similarity(features[block].float(), features[before[block]].float(), dim=-1)
        for block in torch.arange(len(features), device=features.device).split(_BLOCK)
    ]
    return torch.cat(change).masked_fill(before < 0, float("inf"))


def pixel_change(pixels: Tensor, layout: TokenLayout) -> Tensor:
    """float32 [V] mean absolute difference to the same patch one frame before; inf in the first frame of a video.

    Args:
        pixels: [F, 3, height, width] from 0 to 255, frames in the order in which the layout shows them.
        layout: the packed sequence.
    """
    tokens = layout.patches_per_frame
    before = patch_before(layout)
    # Tokens come frame by frame in the order of the pixels, all frames being of one size.
    frame_before = before.view(-1, tokens)[:, 0] // tokens
    change = [
        _patch_difference(pixels[block], pixels[frame_before[block]], isqrt(tokens))
        for block in torch.arange(len(pixels), device=pixels.device).split(_FRAME_BLOCK)
    ]
    return torch.cat(change).flatten().masked_fill(before < 0, float("inf"))


def soft_matching(features: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
    """Who is left after ToMe's last round, and into whom the others merge.

    Args:
        features: [V, D] embeddings of the visual tokens.
        layout: the packed sequence.
        counts: S numbers of visual tokens to pass on (host).
    """
    scores = torch.zeros(len(features), device=features.device)
    partner = torch.arange(len(features), device=features.device)
    for start, present, count in zip(layout.visual_starts(), layout.visual_counts, counts):
        alive, root = _soft_matching(features[start : start + present], count)
        scores[start + alive] = 1.0
        partner[start : start + present] = start + root
    return Ranking(scores, partner)


def patch_before(layout: TokenLayout) -> Tensor:
    """int64 [V]: the same patch in the frame before of the same video, as an index into ``visual_index``; -1: none."""
    device = layout.visual_index.device
    shape = (len(layout.frame_videos), layout.patches_per_frame)
    grid = torch.full(shape, -1, device=device)
    grid[layout.visual_frame, layout.visual_patch] = torch.arange(len(layout.visual_index), device=device)
    video = torch.tensor(layout.frame_videos).to(device, non_blocking=True)
    grid[1:] = torch.where((video[1:] == video[:-1]).unsqueeze(1), grid[:-1], -1)
    grid[:1] = -1
    return grid[layout.visual_frame, layout.visual_patch]


def _patch_difference(frames: Tensor, others: Tensor, side: int) -> Tensor:
    """[F, side * side] mean absolute difference over the patches of side x side, row by row."""
    difference = (frames.float() - others.float()).abs().mean(1)
    return difference.unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean((2, 4)).flatten(1)


def _soft_matching(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merges the tokens of one sample down to a count.

    Args:
        features: [V, D].
        count: tokens to be left, at least 1 if there are any.

    Returns:
        int64 [count] the tokens that are left, rising; int64 [V] the one that each token has been merged into.
    """
    present = len(features)
    alive = root = torch.arange(present, device=features.device)
    merged = features.float()
    while len(alive) > count:
        sources, targets = alive[0::2], alive[1::2]
        num_merged = min(len(alive) - count, len(targets))
        match, cosine = most_similar(merged[0::2], merged[1::2])
        best = torch.sort(cosine, descending=True, stable=True).indices[:num_merged]
        step = torch.arange(present, device=features.device)
        step[sources[best]] = targets[match[best]]
        root = step[root]
        is_left = (step == torch.arange(present, device=features.device))[alive]
        alive = alive[torch.nonzero_static(is_left, size=len(alive) - num_merged).flatten()]
        # The mean of a whole group is what weighting the means of its parts by their sizes gives.
        merged = group_means(features.float(), torch.searchsorted(alive, root), len(alive))
    return alive, root
