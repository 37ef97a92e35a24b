"""What a reduction does to held-out questions: answers, divergence, and answers when another question scored.

The control: tokens are chosen as another question about the same clip would choose them, and the right question is
asked about what is left. Who loses nothing by it does not look at the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hybridprune_megatron.analysis.damage import divergence
from hybridprune_megatron.data.batch import IGNORE_LABEL, EncodedSample, pack
from hybridprune_megatron.evaluation.accuracy import sample_retention
from hybridprune_megatron.evaluation.forward import device_of, length_multiple, measuring
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.settings import Select
from hybridprune_megatron.method.signals import Signals
from hybridprune_megatron.models.video_language_model import VideoLanguageModel
from studies.needles.asked import Asked


@dataclass(frozen=True)
class Measured:
    """One entry a row.

    Attributes:
        right: whether the answer is exactly right.
        kl: divergence of the answer's tokens from those with every token.
        retention: mean share of visual tokens over layers.
        right_by_another: whether it is right when another question scored; empty if no question scores.
    """

    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    retention: list[float] = field(default_factory=list)
    right_by_another: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Replayed(Scorer):
    """Keeps the tokens that another pass kept.

    Attributes:
        kept: by layer, bool over all visual tokens of the one sample this is for: those that entered the next layer.
    """

    needs_question = False
    kept: Mapping[int, Tensor] = field(default_factory=dict)

    def score(self, signals: Signals, layout: TokenLayout, layer: int) -> Tensor:
        """1 for what is to stay, 0 for what is to go."""
        del signals
        return self.kept[layer][_number(layout)].float()


def references(model: VideoLanguageModel, rows: Sequence[Asked]) -> Iterator[tuple[Tensor, Tensor]]:
    """[A, vocabulary] logits with every token and [A] labels of every row's answer."""
    with measuring(model, None):
        for row in rows:
            yield _answered(model, row.sample, None)


def measure(
    model: VideoLanguageModel,
    rows: Sequence[Asked],
    reduction: Reduction | Callable[[Asked], Reduction] | None,
    full: Sequence[tuple[Tensor, Tensor]],
    control: bool = True,
    progress: Callable[[int], object] = lambda done: None,
) -> Measured:
    """Asks every row, one by one.

    Args:
        model: the whole model in one process.
        rows: held-out questions.
        reduction: what to drop; None: nothing; a function: what to drop for a row.
        full: of ``references`` with the same weights.
        control: also let another question score, where a question scores at all and rows have one.
        progress: gets 1 after each row.
    """
    found = Measured()
    for row, (reference, labels) in zip(rows, full, strict=True):
        own = reduction(row) if callable(reduction) else reduction
        trace: list[TokenLayout] = []
        with measuring(model, own):
            logits, _ = _answered(model, row.sample, trace)
        found.right.append(bool((logits.argmax(-1) == labels).all()))
        found.kl.append(divergence(reference, logits))
        (shares,) = sample_retention(trace)
        found.retention.append(sum(shares) / len(shares))
        if control and own is not None and row.other is not None and asks(own):
            found.right_by_another.append(_right_by_another(model, row, own))
        progress(1)
    return found


def asks(reduction: Reduction) -> bool:
    """Whether the question decides what stays."""
    return reduction.scorer is not None and reduction.scorer.needs_question and len(set(reduction.retention)) > 1


def _right_by_another(model: VideoLanguageModel, row: Asked, reduction: Reduction) -> bool:
    assert row.other is not None
    trace: list[TokenLayout] = []
    with measuring(model, reduction):
        _answered(model, row.other, trace)
    with measuring(model, replay(reduction, trace)):
        logits, labels = _answered(model, row.sample, None)
    return bool((logits.argmax(-1) == labels).all())


def replay(reduction: Reduction, trace: Sequence[TokenLayout]) -> Reduction:
    """The reduction that keeps what another pass over one sample kept.

    Args:
        reduction: of that pass; it drops inside, and merges nothing.
        trace: layouts that entered the layers.
    """
    kept = {}
    for layer, layout in enumerate(trace[1:]):
        stays = torch.zeros(layout.original_visual_counts[0], dtype=torch.bool, device=layout.origin.device)
        stays[_number(layout)] = True
        kept[layer] = stays
    how = replace(reduction.select, frame_share=0.0, smoothing_frames=0, min_tokens_per_frame=0)
    assert how.dropped == Select().dropped, "who takes in what is dropped is not in a trace"
    return replace(reduction, score=Replayed(kept=kept), select=how)


def _number(layout: TokenLayout) -> Tensor:
    """int64 [V] of one sample: which of the original visual tokens every visual token is."""
    return layout.visual_frame * layout.patches_per_frame + layout.visual_patch


def _answered(
    model: VideoLanguageModel, sample: EncodedSample, trace: list[TokenLayout] | None
) -> tuple[Tensor, Tensor]:
    batch = pack([sample], length_multiple(model, model.reduction)).to(device_of(model))
    rows = torch.nonzero(batch.labels != IGNORE_LABEL).flatten()
    return model.logits(batch, rows, trace)[0], batch.labels[rows]
