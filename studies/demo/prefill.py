"""How long prefill takes from frames on, with and without reduction, measured in turn on the same samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hybridprune_megatron.data.batch import PackedBatch
from hybridprune_megatron.evaluation.forward import device_of, measuring
from hybridprune_megatron.evaluation.timing import in_turn
from hybridprune_megatron.method.layout import TokenKind
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


@dataclass(frozen=True)
class Timing:
    """Seconds of forward passes over one packed batch.

    Attributes:
        seconds: median by name.
        spread: lowest and highest by name.
        rounds: measured rounds; each runs every candidate once.
        num_samples: samples in the batch.
        num_tokens: tokens in the batch before reduction.
        threads: CPU threads that torch used.
    """

    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    rounds: int
    num_samples: int
    num_tokens: int
    threads: int


def time_prefill(
    model: VideoLanguageModel, batch: PackedBatch, reductions: Mapping[str, Reduction | None], rounds: int = 7
) -> Timing:
    """Prefill from frames and token ids to the logits of every sample's last token, for several reductions.

    One more entry, "vision", times tower and projector alone (of a batch with precomputed features the projector):
    that part is the same in every prefill, so what the language model took is the difference.

    Args:
        model: on one pipeline stage.
        batch: its samples are the ones timed.
        reductions: what to drop, by name; None: nothing.
        rounds: how often each is timed, in turn, after one pass that is not counted.
    """
    batch = batch.to(device_of(model))
    ends = torch.tensor([layout.num_tokens for layout in batch.layouts], device=batch.input_ids.device).cumsum(0) - 1

    def prefill(reduction: Reduction | None) -> Callable[[], object]:
        def run() -> object:
            with measuring(model, reduction):
                return model.logits(batch, ends)

        return run

    candidates = {name: prefill(reduction) for name, reduction in reductions.items()}
    if any(layout.count(TokenKind.FRAME) for layout in batch.layouts):
        candidates["vision"] = lambda: _encode(model, batch)
    taken = in_turn(candidates, rounds)
    return Timing(
        seconds={name: statistics.median(each) for name, each in taken.items()},
        spread={name: (min(each), max(each)) for name, each in taken.items()},
        rounds=rounds,
        num_samples=len(batch.keys),
        num_tokens=len(batch.input_ids),
        threads=torch.get_num_threads(),
    )


def _encode(model: VideoLanguageModel, batch: PackedBatch) -> object:
    with measuring(model, model.reduction):
        return model.embed_frames(batch)
