"""The exported model against the training model on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hybridprune_megatron.data.batch import EncodedSample, pack
from hybridprune_megatron.evaluation.forward import device_of, measuring
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


def max_logit_difference(model: VideoLanguageModel, exported: Any, samples: Sequence[EncodedSample]) -> float:
    """Largest absolute difference of any logit of any token that is left, each model under its own reduction.

    Alignment of packed lengths (``reduction.select.multiple_of``) is left out: the export has none.

    Args:
        model: the training model, unsplit.
        exported: what ``AutoModelForCausalLM.from_pretrained`` gives, on the same device.
        samples: at least one.

    Raises:
        ValueError: the two models do not keep the same visual tokens in every layer, or a sample has features instead
            of frames, which the export does not take.
    """
    largest = 0.0
    reduction = model.reduction and replace(model.reduction, select=replace(model.reduction.select, multiple_of=1))
    with measuring(model, reduction):
        for sample in samples:
            largest = max(largest, _difference(model, exported, sample))
    return largest


def _difference(model: VideoLanguageModel, exported: Any, sample: EncodedSample) -> float:
    if sample.frame_features is not None:
        raise ValueError(f"sample {sample.key} has features: the export takes frames; set data.validation to videos")
    batch = pack([sample]).to(device_of(model))
    trace: list[TokenLayout] = []
    logits, layout = model.logits(batch, trace=trace)
    output = exported(
        input_ids=batch.input_ids[None],
        token_kinds=torch.tensor(sample.layout.kinds())[None],
        frames_per_video=torch.tensor(sample.layout.frames_per_video())[None],
        pixel_values=batch.pixel_values if len(batch.pixel_values) else None,
        output_reduction=True,
    )
    for layer, (mine, theirs) in enumerate(zip(trace, output.reduction.positions, strict=True)):
        if not torch.equal(mine.position[mine.visual_index], torch.cat(theirs)):
            raise ValueError(f"sample {sample.key}: training model and export keep different tokens in layer {layer}")
    return (logits - output.logits[0, layout.origin]).abs().max().item()
