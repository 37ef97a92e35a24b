"""Held-out loss and exact answers of the model as it stands in training, under any parallel layout.

The forward passes are those of training, through megatron's schedules; what a sample scores is added up by sample, so
it does not matter which rank had it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from hybridprune_megatron.data.batch import IGNORE_LABEL, PackedBatch, sums_by_sample
from hybridprune_megatron.engine.parallel import data_rank, from_rank_0
from hybridprune_megatron.engine.rng_state import restore_rng_state, rng_state
from hybridprune_megatron.engine.train_step import Recorder, run_schedule, sum_over_job

if TYPE_CHECKING:
    from hybridprune_megatron.engine.optimization import TrainState

#: Of a sample in the table of a validation: sum of its losses, labels that are the likeliest token, labels.
_COLUMNS = 3


class Planned(Protocol):
    """A sample of a plan; see ``data.validation_set.HeldOut``."""

    @property
    def answered(self) -> bool:
        """The data set says which answer is right."""


class Samples(Protocol):
    """What is validated on; see ``data.validation_set.ValidationSet``."""

    def plan(self) -> list[list[Any]]:
        """The packed sequences, each a list of ``Planned``."""

    def read(self, planned: Sequence[Any]) -> tuple[PackedBatch | None, list[bool]]:
        """One of them, and which of its samples are in it."""

    def filler(self) -> PackedBatch:
        """A short sequence without a sample."""


class Validator:
    """Measures a model in training on held-out samples, and leaves nothing of it behind. Every rank has one.

    Packed sequences are dealt out to the replicas; all of them run as many, filled up with short ones.

    Args:
        samples: read by rank 0 for the plan, by every replica for its share.
        sequence_length: tokens of a packed sequence.
        both: measure under the model's reduction and with every token; else the one forward pass is both.

    Raises:
        ValueError: on every rank, if no sample can be used.

    Attributes:
        knows_answers: the data set says of some sample which answer is right.
    """

    def __init__(self, samples: Samples, sequence_length: int, both: bool) -> None:
        self._samples = samples
        self._sequence_length = sequence_length
        self._both = both
        with _kept_generators():
            self._plan: list[list[Planned]] = from_rank_0(samples.plan)
        self._answered = torch.tensor([each.answered for planned in self._plan for each in planned])
        self.knows_answers = bool(self._answered.any())
        ends = torch.tensor([0, *map(len, self._plan)]).cumsum(0)
        #: Number of the first sample of every packed sequence.
        self._starts = ends[:-1].tolist()

    def measure(self, state: TrainState) -> dict[str, float]:
        """Figures of the model, equal on all ranks. Weights, generators and modes are afterwards what they were.

        Returns:
            "loss", mean over the answers' tokens under the model's reduction (nats), and "accuracy", the share of exact
            greedy answers among the samples with a known one, if there are any; "loss_full" and "accuracy_full" with
            every token, if that is another pass; "samples", how many could be used.
        """
        with _undisturbed(state):
            found = self._figures(self._table(state))
            if self._both:
                with _every_token(state):
                    full = self._figures(self._table(state))
                found |= {f"{name}_full": value for name, value in full.items() if name != "samples"}
        return found

    def _figures(self, table: Tensor) -> dict[str, float]:
        losses, right, labels = table.unbind(1)
        used = labels > 0
        found = {"loss": float(losses.sum() / labels.sum())}
        answered = used & self._answered
        if answered.any():
            found["accuracy"] = float((right == labels)[answered].double().mean())
        return found | {"samples": int(used.sum())}

    def _table(self, state: TrainState) -> Tensor:
        """float64 [samples of the plan, _COLUMNS], on the host; zeros for a sample that could not be decoded."""
        where, stages = data_rank(), parallel_state.get_pipeline_model_parallel_world_size()
        own = list(range(len(self._plan)))[where.rank :: where.size]
        count = -(-len(self._plan) // where.size)
        if len(state.ddp) > 1:
            # An interleaved schedule runs as many as there are stages at once.
            count = -(-count // stages) * stages
        device = next(state.ddp[0].parameters()).device
        #: Of every sequence that was read, the samples that are in it.
        read: list[list[int]] = []
        recorder = Recorder(self._read(own, count, read), device)
        outputs = run_schedule(state.ddp, recorder, count, self._sequence_length, _judging_step, forward_only=True)
        table = torch.zeros(len(self._answered), _COLUMNS, dtype=torch.float64)
        for numbers, output in zip(read, outputs):
            table[numbers] = _by_sample(output)[: len(numbers)]
        whole = table.to(device)
        sum_over_job(whole)
        return whole.cpu()

    def _read(self, own: Sequence[int], count: int, read: list[list[int]]) -> Iterator[PackedBatch]:
        """This replica's sequences, and fillers up to ``count``; ``read`` gets the numbers of their samples."""
        for index in own:
            batch, present = self._samples.read(self._plan[index])
            read.append([self._starts[index] + place for place, there in enumerate(present) if there])
            yield self._samples.filler() if batch is None else batch
        for _ in range(count - len(own)):
            read.append([])
            yield self._samples.filler()


def _judging_step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return model(batch, judged=True), partial(_judged, batch)


def _judged(batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The schedule's loss function; its dict has the judged rows (float32 [2, R]) and what tells whose they are."""
    tokens = torch.tensor(output.shape[1], dtype=torch.int, device=output.device)
    lengths = [layout.num_tokens for layout in batch.layouts]
    return output[0].sum(), tokens, {"judged": output.detach(), "labels": batch.labels, "lengths": lengths}


def _by_sample(output: dict[str, Any]) -> Tensor:
    """float64 [S, _COLUMNS] of one packed sequence, on the host: what this context-parallel rank adds."""
    rows = torch.nonzero(output["labels"].cpu() != IGNORE_LABEL).flatten()
    # Of a row's labels one rank of those that share the sequence speaks, of its loss the one that has it.
    speaks = float(parallel_state.get_context_parallel_rank() == 0)
    values = torch.cat([output["judged"].cpu().T.double(), torch.full((len(rows), 1), speaks)], 1)
    return sums_by_sample(values, rows, output["lengths"])


@contextmanager
def _kept_generators() -> Iterator[None]:
    generators = rng_state()
    try:
        yield
    finally:
        restore_rng_state(generators)


@contextmanager
def _undisturbed(state: TrainState) -> Iterator[None]:
    """Eval mode; afterwards modes and generators are what they were."""
    before = [chunk.training for chunk in state.ddp]
    with _kept_generators(), ExitStack() as hooks:
        for chunk in state.ddp:
            if chunk.use_forward_hook:
                # What the last update left to be gathered in the next pass of training is gathered now, and then again.
                chunk.disable_forward_pre_hook()
                hooks.callback(chunk.enable_forward_pre_hook)
            chunk.eval()
        try:
            yield
        finally:
            for chunk, mode in zip(state.ddp, before):
                chunk.train(mode)


@contextmanager
def _every_token(state: TrainState) -> Iterator[None]:
    """The model with nothing dropped."""
    models = [unwrap_model(chunk) for chunk in state.ddp]
    reductions = [model.reduction for model in models]
    for model in models:
        model.reduction = None
    try:
        yield
    finally:
        for model, reduction in zip(models, reductions):
            model.reduction = reduction
