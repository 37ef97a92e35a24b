"""Distillation from the same model without reduction: what a sample's answer would be if no token were dropped.

Shape letters: R rows with a label, W rows of the vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from hybridprune_megatron.data.batch import PackedBatch
from hybridprune_megatron.models.video_language_model import VideoLanguageModel, loss_rows


def vocab_parallel_kl(student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))`` of logits that are split over the vocabulary.

    Args:
        student: float [R, W]; gets the gradient.
        teacher: float [R, W].
        temperature: T, above 0.
        group: the tensor-parallel ranks.

    Returns:
        float32 [R], the same on every rank (nats).
    """
    student, student_sum = _shifted(student, temperature, group)
    teacher, teacher_sum = _shifted(teacher.detach(), temperature, group)
    target = (teacher - teacher_sum.log().unsqueeze(-1)).exp()
    # The sum over the vocabulary of target * (log target - log prediction), with both normalisers taken out of it: they
    # are the same on every rank, and would be counted once a rank inside.
    gap = reduce_from_tensor_model_parallel_region((target * (teacher - student)).sum(-1), group=group)
    return gap + student_sum.log() - teacher_sum.log()


def _shifted(logits: Tensor, temperature: float, group: Any) -> tuple[Tensor, Tensor]:
    """float32 logits / T below 0 in every row, and the sum of their exponentials over the whole vocabulary."""
    scaled = logits.float() / temperature
    peak = scaled.detach().amax(-1, keepdim=True)
    if group.size() > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX, group=group)
    shifted = scaled - peak
    return shifted, reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1), group=group)


class DistillingModel(VideoLanguageModel):
    """A video language model whose training loss is ``(1 - w) CE + w T^2 KL(teacher || student)`` per answer token.

    The teacher is the same model with nothing dropped, in the same step and without gradient. It has today's weights,
    or the initial ones once ``keep_initial_weights`` was called: of those only what is trained is kept twice.

    Args:
        args, kwargs: as for ``VideoLanguageModel``.
        weight: w, from 0 to 1.
        temperature: T, above 0. T^2 keeps the size of the gradient (Hinton et al. 2015).

    Attributes:
        loss_parts: float32 [2], without gradient, of the last forward pass in training: the sums of CE and of
            T^2 KL over its rows; None: there was none.
    """

    def __init__(self, *args: Any, weight: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.temperature = weight, temperature
        self._initial: dict[str, Tensor] = {}
        self.loss_parts: Tensor | None = None

    def keep_initial_weights(self) -> None:
        """Makes the present weights the teacher's, whatever the model learns; call it where they have their dtype."""
        self._initial = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch: PackedBatch, judged: bool = False) -> Tensor:
        """As ``VideoLanguageModel.forward``; in eval mode, and ``judged``, the plain cross entropy."""
        self.loss_parts = None
        if judged or not self.training:
            return super().forward(batch, judged)
        rows = loss_rows(batch)
        teacher = self._teacher_logits(batch, rows)
        student, _ = self.logits(batch, rows)
        divergence = vocab_parallel_kl(student, teacher, self.temperature, self.language_model.pg_collection.tp)
        # Last: megatron's cross entropy overwrites fp32 logits.
        labels = batch.labels[rows].unsqueeze(0)
        entropy = self.language_model.compute_language_model_loss(labels, student.unsqueeze(1)).squeeze(0).float()
        self.loss_parts = torch.stack([entropy.detach().sum(), self.temperature**2 * divergence.detach().sum()])
        return (1 - self.weight) * entropy + self.weight * self.temperature**2 * divergence

    @torch.no_grad()
    def _teacher_logits(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """float [R, W] logits with nothing dropped, without dropout."""
        reduction, self.reduction = self.reduction, None
        self.eval()
        try:
            names = {f"model.{name}": value for name, value in self._initial.items()}
            return torch.func.functional_call(_Logits(self), names, (replace(batch, retention=None), rows))
        finally:
            self.reduction = reduction
            self.train()


class _Logits(nn.Module):
    """Logits as a module of its own, to be called with other weights."""

    def __init__(self, model: VideoLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        return self.model.logits(batch, rows)[0]
