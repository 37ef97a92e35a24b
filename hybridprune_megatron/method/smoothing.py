"""Scores averaged over time: a patch is important if it is so in the frames around it too."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout


def smoothed(scores: Tensor, layout: TokenLayout, num_frames: int) -> Tensor:
    """Mean score of a patch over the frames around it.

    ``s_vfp := mean of s_vf'p over |f - f'| <= num_frames``, over the tokens of the same patch p and video v that are
    still there; frames are counted as they were before any reduction, and so is the memory. Nothing waits for the
    device.

    Args:
        scores: float [V] in the order of ``layout.visual_index``.
        layout: the packed sequence the scores belong to.
        num_frames: frames on either side; 0 returns the scores as they are.

    Returns:
        float [V].
    """
    frames = len(layout.frame_videos)
    if not num_frames or not frames:
        return scores
    where = (layout.visual_frame, layout.visual_patch)
    # Scores and how many of them there are, side by side: [2, frames, patches].
    grid = scores.new_zeros(2, frames, layout.patches_per_frame)
    grid[0].index_put_(where, scores)
    grid[1].index_put_(where, torch.ones_like(scores))
    video = torch.tensor(layout.frame_videos).to(scores.device, non_blocking=True)
    total = grid.clone()
    for distance in range(1, min(num_frames, frames - 1) + 1):
        same_video = (video[distance:] == video[:-distance]).unsqueeze(1)
        total[:, distance:] += grid[:, :-distance] * same_video
        total[:, :-distance] += grid[:, distance:] * same_video
    return (total[0] / total[1])[where]
