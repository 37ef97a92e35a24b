"""Forward passes for measuring: held-out samples packed into batches, with or without reduction, no gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from hybridprune_megatron.data.batch import EncodedSample, PackedBatch, pack
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


@contextmanager
def measuring(model: VideoLanguageModel, reduction: Reduction | None) -> Iterator[VideoLanguageModel]:
    """The model in eval mode, without gradients and under another reduction; everything is put back afterwards.

    Args:
        model: on one pipeline stage.
        reduction: what to drop meanwhile; None: nothing.

    Raises:
        ValueError: the model is a part of a pipeline.
    """
    if not (model.pre_process and model.post_process):
        raise ValueError("the model is one of several pipeline stages: evaluate with parallel.pipeline=1")
    before = model.reduction, model.training
    model.reduction = reduction
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.reduction = before[0]
        model.train(before[1])


def packed_batches(samples: Iterable[EncodedSample], max_tokens: int, multiple_of: int = 1) -> Iterator[PackedBatch]:
    """Samples in their order, as many to a batch as fit.

    Args:
        samples: read one after another, so they may come from a generator.
        max_tokens: length of a batch before reduction; a longer sample gets a batch of its own.
        multiple_of: padding to this multiple (see ``length_multiple``).
    """
    waiting: list[EncodedSample] = []
    length = 0
    for sample in samples:
        if waiting and length + sample.layout.num_tokens > max_tokens:
            yield pack(waiting, multiple_of)
            waiting, length = [], 0
        waiting.append(sample)
        length += sample.layout.num_tokens
    if waiting:
        yield pack(waiting, multiple_of)


def length_multiple(model: VideoLanguageModel, *reductions: Reduction | None) -> int:
    """What the length of a batch must divide by for this model under each of some reductions."""
    own = model.language_model.decoder.multiple_of
    return math.lcm(own, *(reduction.select.multiple_of for reduction in reductions if reduction is not None))


def device_of(model: VideoLanguageModel) -> torch.device:
    """The device of the model's weights."""
    return next(model.parameters()).device
