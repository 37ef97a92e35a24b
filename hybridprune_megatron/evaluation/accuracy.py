"""Exact answers: a sample counts if greedy decoding would write its answer and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from hybridprune_megatron.data.batch import IGNORE_LABEL, PADDING_KEY, PackedBatch, sums_by_sample
from hybridprune_megatron.evaluation.forward import device_of, length_multiple, measuring, packed_batches
from hybridprune_megatron.evaluation.held_out import Question
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.models.language_model import likeliest_tokens
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


@dataclass(frozen=True)
class Retention:
    """Measured shares of visual tokens.

    Attributes:
        by_layer: share that entered every layer, mean over samples.
        mean: over layers; to be compared with the budget.
    """

    by_layer: tuple[float, ...]
    mean: float

    @staticmethod
    def of(shares: Sequence[Sequence[float]]) -> Retention:
        """The mean over samples.

        Args:
            shares: one row a sample, one share a layer; without rows (nothing shown was visual) nothing was dropped.
        """
        by_layer = tuple(fmean(layer) for layer in zip(*shares)) or (1.0,)
        return Retention(by_layer, fmean(by_layer))


def sample_retention(trace: Sequence[TokenLayout]) -> list[tuple[float, ...]]:
    """Per sample with visual tokens, the share of them that entered every layer.

    Args:
        trace: the layout that entered every layer (``VideoLanguageModel.logits``); of the first one too, a reduction in
            front of the model may have dropped tokens.
    """
    originals = trace[0].original_visual_counts
    counts = zip(*(layout.visual_counts for layout in trace))
    return [tuple(count / whole for count in sample) for sample, whole in zip(counts, originals) if whole]


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a list of questions.

    Attributes:
        accuracy: share of exact answers.
        by_kind: the same for every kind of question.
        num_samples: number of questions.
        retention: what was kept, measured in the same passes.
        correct: by sample key, for comparing two models sample by sample.
    """

    accuracy: float
    by_kind: dict[str, float]
    num_samples: int
    retention: Retention
    correct: dict[str, bool] = field(repr=False)


def evaluate(
    model: VideoLanguageModel,
    questions: Sequence[Question],
    reduction: Reduction | None,
    max_tokens: int,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Accuracy and measured retention of a model on held-out samples.

    The answer's tokens are given while each is predicted (teacher forcing). All of them being the likeliest token is
    the same as greedy decoding giving exactly the answer and its end: the first wrong token ends both.

    Args:
        model: any tensor-parallel part, on one pipeline stage; every rank calls this and gets the same result.
        questions: at least one; keys differ.
        reduction: what to drop; None: nothing.
        max_tokens: length of a packed batch before reduction.
        progress: gets the number of samples of every batch that is done.
    """
    if not questions:
        raise ValueError("0 held-out samples: evaluate at least one (trainer.eval_samples, data.validation)")
    correct: dict[str, bool] = {}
    shares: list[tuple[float, ...]] = []
    with measuring(model, reduction):
        samples = (question.sample for question in questions)
        for batch in packed_batches(samples, max_tokens, length_multiple(model, reduction)):
            trace: list[TokenLayout] = []
            right = answers_right(model, batch, trace)
            correct |= {key: fine for key, fine in zip(batch.keys, right) if key != PADDING_KEY}
            shares += sample_retention(trace)
            if progress is not None:
                progress(len([key for key in batch.keys if key != PADDING_KEY]))
    if len(correct) != len(questions):
        raise ValueError(f"{len(questions)} held-out samples have {len(correct)} different keys: keys must differ")
    kinds = sorted({question.kind for question in questions})
    by_kind = {kind: fmean([correct[q.sample.key] for q in questions if q.kind == kind]) for kind in kinds}
    return Evaluation(fmean(correct.values()), by_kind, len(correct), Retention.of(shares), correct)


def evaluate_each(
    model: VideoLanguageModel,
    questions: Sequence[Question],
    reductions: Mapping[str, Reduction | None],
    max_tokens: int,
) -> dict[str, Evaluation]:
    """``evaluate`` under several reductions, by name, with a progress bar for each."""
    found = {}
    for name, reduction in reductions.items():
        with tqdm(total=len(questions), desc=f"  {name}", unit="clip", leave=False) as bar:
            found[name] = evaluate(model, questions, reduction, max_tokens, bar.update)
    return found


def answers_right(model: VideoLanguageModel, batch: PackedBatch, trace: list[TokenLayout] | None = None) -> list[bool]:
    """For every sample of a batch, whether all its labels are the likeliest tokens; True for a sample without labels.

    Args:
        model: in eval mode, see ``measuring``.
        batch: on any device.
        trace: gets the layout that enters every layer.
    """
    rows = torch.nonzero(batch.labels != IGNORE_LABEL).flatten()
    device = device_of(model)
    logits, _ = model.logits(batch.to(device), rows.to(device), trace)
    best = likeliest_tokens(logits, model.language_model.pg_collection.tp).cpu()
    return right_by_sample(best == batch.labels[rows], rows, [layout.num_tokens for layout in batch.layouts])


def right_by_sample(right: Tensor, rows: Tensor, lengths: Sequence[int]) -> list[bool]:
    """Whether all rows of each sample are right.

    Args:
        right: bool [R].
        rows: int64 [R], positions in the packed sequence.
        lengths: S lengths of the samples.
    """
    return (sums_by_sample((~right).unsqueeze(1), rows, lengths) == 0).squeeze(1).tolist()
