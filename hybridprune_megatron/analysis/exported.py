"""What an export says it kept, as the pictures take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.analysis.strip import KeptPatches
from hybridprune_megatron.data.video import FrameSampling
from hybridprune_megatron.method.layout import TokenKind


def kept_of_export(
    inputs: dict[str, Tensor], positions: Sequence[Sequence[Tensor]], symbols: str, title: str
) -> KeptPatches:
    """What was kept of the video of one sample.

    Args:
        inputs: what the export's processor returned for it, without padding.
        positions: those of the ``ReductionStatistics`` of its prefill.
        symbols: of the layers.
        title: what was asked and answered.
    """
    is_visual = inputs["token_kinds"][0] == TokenKind.FRAME
    number = is_visual.cumsum(0) - 1
    total, frames = int(is_visual.sum()), len(inputs["pixel_values"])
    kept = torch.zeros(len(symbols), total, dtype=torch.bool)
    for layer, (entered,) in enumerate(positions):
        kept[layer, number[entered.cpu()]] = True
    return KeptPatches(inputs["pixel_values"], torch.arange(total) // (total // frames), kept, symbols, title)


def sampling_of(processor: Any) -> FrameSampling:
    """Which frames of a video an export's processor takes."""
    return FrameSampling(processor.sampling, processor.num_frames, processor.fps, processor.max_frames)
