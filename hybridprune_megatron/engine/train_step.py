"""One optimizer step through megatron's pipeline schedules.

The loss is the mean over every loss token of the job: micro batches, replicas and samples of any length weigh
by their tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from hybridprune_megatron.data.batch import PADDING_KEY
from hybridprune_megatron.models.stage_cut import StageCommunicator

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from hybridprune_megatron.data.batch import PackedBatch
    from hybridprune_megatron.engine.optimization import TrainState
    from hybridprune_megatron.method.counts import PackSizes


#: Samples that a message names.
_MAX_NAMED = 8


@dataclass(frozen=True)
class StepResult:
    """What one step did; every field is the same on every rank.

    Attributes:
        loss: mean loss per loss token, before the update (nats).
        loss_tokens: tokens that carry a loss, in the whole job.
        tokens: tokens that entered the model, in the whole job.
        grad_norm: L2 norm of the mean gradient, before clipping.
        lr: learning rate of the update, before ``optim.lr_scale``.
        samples: 16 hex digits that identify the samples of this step and their order, whichever replica had which.
        spread: tokens of the replica that had most, over their mean; what the others wait.
        memory: bytes that tensors have taken at most so far on the fullest rank's GPU; on CPUs, that its process was
            resident with at most.
        operations: of forward and backward, in the whole job; 0: not counted.
        budget: mean of what was drawn for the samples; None: nothing was.
        parts: means per loss token of the answers' loss and of distillation's, before they are weighed (nats); None
            where the loss has one part.
        skipped: why the update was left out, naming samples; None if it was made.
    """

    loss: float
    loss_tokens: int
    tokens: int
    grad_norm: float
    lr: float
    samples: str
    spread: float
    memory: int = 0
    operations: float = 0.0
    budget: float | None = None
    parts: tuple[float, float] | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Losses:
    """What the pipeline found.

    Attributes:
        total: loss sum of the whole job, equal on all ranks.
        tokens: loss tokens of the whole job, equal on all ranks.
        micro: this rank's loss sum of each of its micro batches; none but on the last stage.
        parts: sums of the whole job of the answers' loss and of distillation's; None where the loss has one part.
        operations: see ``StepResult``, as is ``budget``.
    """

    total: float
    tokens: int
    micro: list[Tensor]
    parts: tuple[float, float] | None
    operations: float
    budget: float | None


class Recorder:
    """Hands micro-batches to the schedule and keeps what the log needs of them."""

    def __init__(
        self, batches: Iterator[PackedBatch], device: torch.device, count: Callable[[PackSizes], int] | None = None
    ) -> None:
        """Args: batches: are read. device: they are moved there. count: operations of one; None: nobody asks."""
        self._batches = batches
        self._device = device
        self._count = count
        # Read, and not handed out to every chunk of layers yet.
        self._waiting: dict[int, PackedBatch] = {}
        # Of each micro-batch in order.
        self.keys: list[tuple[str, ...]] = []
        self.sizes: list[PackSizes] = []
        self.tokens = 0
        # Drawn for samples, not for what fills a sequence up.
        self.budgets: list[float] = []

    def batch(self, index: int) -> PackedBatch:
        """A micro-batch that was not handed out to every chunk of layers, maybe ahead of its turn."""
        while index >= len(self.keys):
            self._waiting[len(self.keys)] = batch = self._read()
            self.keys.append(tuple(batch.keys))
            if self._count is not None:
                self.sizes.append(batch.sizes)
            self.tokens += batch.input_ids.numel()
            self.budgets += [budget for key, budget in zip(batch.keys, batch.budgets or ()) if key != PADDING_KEY]
        return self._waiting[index]

    def operations(self) -> int:
        """Of forward and backward over all micro-batches; 0 where nobody asks."""
        return 0 if self._count is None else sum(map(self._count, self.sizes))

    def one_each(self, num_chunks: int) -> list[Iterator[PackedBatch]]:
        """All micro-batches, once for every chunk of layers on this stage."""
        return [self._passed(last=chunk == num_chunks - 1) for chunk in range(num_chunks)]

    def _passed(self, last: bool) -> Iterator[PackedBatch]:
        for index in count():
            batch = self.batch(index)
            if last:
                del self._waiting[index]
            yield batch

    def _read(self) -> PackedBatch:
        try:
            return next(self._batches).to(self._device)
        except StopIteration:
            # Lightning would swallow a StopIteration here and count the step as done.
            raise ValueError("the training data ended; the loader must repeat it (data.train)") from None


def _loss(model: torch.nn.Module, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The schedule's loss function: sum of ``output`` (float32 [R], this rank's), its token count, all for the log."""
    total = output.float().sum()
    tokens = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
    parts = _loss_parts(model)
    # A clone, not a detach: the schedule scales the returned loss in place.
    found = {"sum": total.detach().clone(), "tokens": tokens.clone()}
    return total, tokens, found | {"parts": total.new_zeros(2) if parts is None else parts}


def _loss_parts(chunk: torch.nn.Module) -> Tensor | None:
    """See ``DistillingModel.loss_parts``; None for every other model."""
    return getattr(unwrap_model(chunk), "loss_parts", None)


def _forward_step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    return model(next(batches)), partial(_loss, model)


def run_schedule(
    chunks: list[torch.nn.Module],
    batches: Recorder,
    num_microbatches: int,
    sequence_length: int,
    forward_step: Callable[[Iterator[PackedBatch], torch.nn.Module], tuple[Tensor, Any]],
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Runs the pipeline.

    Args:
        chunks: the model, or what this stage of an interleaved pipeline holds of it.
        batches: as many micro batches at least.
        num_microbatches: how many are run; the same on every rank.
        sequence_length: tokens of a packed sequence.
        forward_step: (micro batches, chunk) -> what the chunk makes of the next one, and the function of it that gives
            loss sum, loss tokens, and a dict for the caller.
        forward_only: without gradients.

    Returns:
        The dicts of this rank's micro batches in order; none but on the last stage.
    """
    communication: dict[str, Any] = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        stages = [unwrap_model(chunk) for chunk in chunks]
        communication = {
            "p2p_communicator": StageCommunicator(
                stages[0].config,
                lambda chunk, index: stages[chunk].input_shape(batches.batch(index)),
                num_microbatches,
                len(chunks),
            ),
            "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
        }
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches.one_each(len(chunks)),
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
        **communication,
    )


def sum_over_job(totals: Tensor) -> None:
    """Adds up, in place, what the replicas and context-parallel ranks of the last stage have, for every rank."""
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # Only the last stage has seen a loss.
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, last, group=parallel_state.get_pipeline_model_parallel_group())


def summed_losses(
    chunks: list[torch.nn.Module], batches: Recorder, num_microbatches: int, sequence_length: int, forward_only: bool
) -> Losses:
    """Runs the pipeline for its loss.

    Args: as for ``run_schedule``.
    """
    outputs = run_schedule(chunks, batches, num_microbatches, sequence_length, _forward_step, forward_only)
    # Counted while the device is still at work on what was queued.
    work = [float(batches.operations()), sum(batches.budgets), float(len(batches.budgets))]
    device = next(chunks[0].parameters()).device
    # float64: the sums of many micro batches keep every digit of their float32 losses.
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for output in outputs:
        pair = torch.stack([output["sum"].double(), output["tokens"].double()])
        totals += torch.cat([pair, output["parts"].double()])
    totals = torch.cat([totals, torch.tensor(work, dtype=torch.float64).to(device, non_blocking=True)])
    sum_over_job(totals)
    total, tokens, answers, distillation, *summed = totals.tolist()
    # Context-parallel ranks have counted the same sequences.
    operations, drawn, number = (value / parallel_state.get_context_parallel_world_size() for value in summed)
    return Losses(
        total=total,
        tokens=int(tokens),
        micro=[output["sum"] for output in outputs],
        # No pipeline distils, so every rank knows whether this one did.
        parts=None if _loss_parts(chunks[0]) is None else (answers, distillation),
        operations=operations,
        budget=drawn / number if number else None,
    )


def _gather_counts(batches: Recorder, device: torch.device) -> tuple[list[int], str]:
    """Tokens of every replica, and a fingerprint of all their samples in order of streams."""
    replicas = parallel_state.get_data_parallel_world_size()
    counts = torch.zeros(replicas, 1 + len(batches.keys), dtype=torch.int64, device=device)
    digests = [hashlib.sha256("\n".join(keys).encode()).digest() for keys in batches.keys]
    own = [batches.tokens, *(int.from_bytes(digest[:8], "little", signed=True) for digest in digests)]
    counts[parallel_state.get_data_parallel_rank()] = torch.tensor(own, device=device)
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    fingerprint = hashlib.sha256(repr(counts[:, 1:].flatten().tolist()).encode()).hexdigest()[:16]
    return counts[:, 0].tolist(), fingerprint


def _most_memory(device: torch.device) -> int:
    """See ``StepResult.memory``. The allocator's own count: nothing waits for the device's memory to be read."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    most = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _named_samples(batches: Recorder, sums: list[Tensor]) -> str:
    """Samples of the micro batches whose loss is not finite, of all if none is known, over the job; a few by key."""
    bad = [index for index, total in enumerate(sums) if not torch.isfinite(total)]
    own = [key for index in bad for key in batches.keys[index]]
    everywhere: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(everywhere, (own, [key for keys in batches.keys for key in keys]))
    # A set: processes of one replica have the same samples.
    named = sorted({key for bad_keys, _ in everywhere for key in bad_keys})
    named = named or sorted({key for _, keys in everywhere for key in keys})
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return f"samples {', '.join(named[:_MAX_NAMED])}{more}"


def _ready_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the mean gradient, without an update."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def _update(state: TrainState, loss: float, look_first: bool) -> float:
    """Makes the update if the loss is finite; returns the gradient's norm, 0 where none was computed.

    Args:
        state: changed in place.
        loss: of the step.
        look_first: an update of a gradient that is not finite is not made either.
    """
    if not math.isfinite(loss):
        return 0.0
    if look_first:
        norm = _ready_norm(state.optimizer)
        if not math.isfinite(norm):
            return norm
    _, norm, _ = state.optimizer.step()
    # Without clipping megatron computes no norm.
    return float(norm) if norm is not None else 0.0


def train_step(
    state: TrainState,
    batches: Iterator[PackedBatch],
    num_microbatches: int,
    sequence_length: int,
    step: int,
    nonfinite: str = "stop",
    operations: Callable[[PackSizes], int] | None = None,
) -> StepResult:
    """Forward, backward, update and schedule for one global batch.

    Args:
        state: changed in place.
        batches: endless; ``num_microbatches`` are taken.
        num_microbatches: packed sequences this replica computes.
        sequence_length: tokens of a packed sequence (only a pipeline without variable lengths reads it).
        step: number of this step, from 1, for error messages.
        nonfinite: what a loss or gradient that is not finite does; "stop" raises, "skip" leaves the update out (the
            schedule counts the step) at the price of a second gradient norm.
        operations: of forward and backward over a packed sequence; None: not counted.

    Returns:
        The step's result, equal on all ranks.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite and that stops. No checkpoint holds the step.
        ValueError: if the data ends.
    """
    device = next(state.ddp[0].parameters()).device
    recorder = Recorder(batches, device, operations)
    for chunk in state.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    losses = summed_losses(state.ddp, recorder, num_microbatches, sequence_length, forward_only=False)
    divisor = max(losses.tokens, 1)
    loss = losses.total / divisor
    lr = max(group["lr"] / group["lr_mult"] for group in state.optimizer.param_groups)
    skips = nonfinite == "skip"
    grad_norm = _update(state, loss, look_first=skips)
    problem = None
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        what = f"loss={loss}" if not math.isfinite(loss) else f"gradient norm={grad_norm} (loss={loss})"
        problem = f"{what} at step {step}; {_named_samples(recorder, losses.micro)}"
        if not skips:
            raise FloatingPointError(
                f"{problem}; lower optim.lr or check those samples; the same command continues from the last "
                "checkpoint, with trainer.nonfinite=skip past such steps"
            )
    state.scheduler.step(increment=1)
    tokens, samples = _gather_counts(recorder, device)
    spread = max(tokens) * len(tokens) / max(sum(tokens), 1)
    return StepResult(
        loss=loss,
        loss_tokens=losses.tokens,
        tokens=sum(tokens),
        grad_norm=grad_norm,
        lr=lr,
        samples=samples,
        spread=spread,
        memory=_most_memory(device),
        operations=losses.operations,
        budget=losses.budget,
        parts=None if losses.parts is None else (losses.parts[0] / divisor, losses.parts[1] / divisor),
        skipped=problem,
    )
