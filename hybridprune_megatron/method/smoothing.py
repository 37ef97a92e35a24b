"""Scores that look around: a patch is important if it is so in the frames around it, or if its own frame is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout


def smoothed(scores: Tensor, layout: TokenLayout, num_frames: int) -> Tensor:
    """Mean score of a patch over the frames around it.

    ``s_vfp := mean of s_vf'p over |f - f'| <= num_frames``, over the tokens of the same patch p and video v that are
    still there; frames are counted as they were before any reduction, and so is the memory. Tokens whose frames reach
    the same others get the same score to the bit, so that the earlier of them stays and not what rounding prefers.
    Nothing waits for the device.

    Args:
        scores: float [V] in the order of ``layout.visual_index``.
        layout: the packed sequence the scores belong to.
        num_frames: frames on either side; 0 returns the scores as they are.

    Returns:
        float [V].
    """
    if not num_frames or not layout.frame_videos:
        return scores
    where = (layout.visual_frame, layout.visual_patch)
    # Scores and how many of them there are, side by side, after an empty frame: [2, frames + 1, patches].
    grid = torch.zeros(
        2, len(layout.frame_videos) + 1, layout.patches_per_frame, dtype=torch.float64, device=scores.device
    )
    behind = (layout.visual_frame + 1, layout.visual_patch)
    grid[0].index_put_(behind, scores.double())
    grid[1].index_put_(behind, torch.ones_like(scores, dtype=torch.float64))
    first, last = _reach(layout.frame_videos, num_frames).to(scores.device, non_blocking=True)
    sums = grid.cumsum(1)
    total, count = sums[:, last + 1] - sums[:, first]
    return (total / count)[where].to(scores.dtype)


def with_frame(scores: Tensor, layout: TokenLayout, share: float) -> Tensor:
    """Every token's score plus a share of the highest one in its frame.

    ``s_j := s_j + share * max_{j' in frame of j} s_j'``, over the tokens that are still there. Where something lies in
    its frame is held by the tokens around it as much as by its own, so an important token keeps some of its neighbours.
    Nothing waits for the device.

    Args:
        scores: float [V] in the order of ``layout.visual_index``.
        layout: the packed sequence the scores belong to.
        share: 0 returns the scores as they are; at 1 whole frames stay before others.

    Returns:
        float [V].
    """
    if not share or not layout.frame_videos:
        return scores
    highest = scores.new_full((len(layout.frame_videos),), -torch.inf)
    highest.scatter_reduce_(0, layout.visual_frame, scores, "amax")
    return scores + share * highest[layout.visual_frame]


def _reach(frame_videos: Sequence[int], num_frames: int) -> Tensor:
    """int64 [2, frames]: first and last frame around every frame that belong to its video."""
    first: list[int] = []
    last: list[int] = []
    for _, run in groupby(range(len(frame_videos)), key=lambda frame: frame_videos[frame]):
        frames = list(run)
        first += [max(frame - num_frames, frames[0]) for frame in frames]
        last += [min(frame + num_frames, frames[-1]) for frame in frames]
    return torch.tensor([first, last])
