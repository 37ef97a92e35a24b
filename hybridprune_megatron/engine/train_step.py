"""One optimizer step, and one evaluation pass, through megatron's pipeline schedules.

The loss is the mean over every loss token of the job: micro batches, replicas and samples of any length weigh
by their tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

if TYPE_CHECKING:
    from hybridprune_megatron.data.batch import PackedBatch
    from hybridprune_megatron.engine.optimization import TrainState


@dataclass(frozen=True)
class StepResult:
    """What one step did; every field is the same on every rank.

    Attributes:
        loss: mean loss per loss token, before the update (nats).
        loss_tokens: tokens that carry a loss, in the whole job.
        tokens: tokens that entered the model, in the whole job.
        grad_norm: L2 norm of the mean gradient, before clipping.
        lr: learning rate of the update, before ``optim.lr_scale``.
        samples: 16 hex digits that identify the samples of this step and their order, on all replicas.
    """

    loss: float
    loss_tokens: int
    tokens: int
    grad_norm: float
    lr: float
    samples: str


class _Recorder:
    """Hands micro batches to the schedule and keeps what the log needs of them."""

    def __init__(self, batches: Iterator[PackedBatch], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self.keys: list[str] = []
        self.tokens = 0

    def __iter__(self) -> _Recorder:
        return self

    def __next__(self) -> PackedBatch:
        try:
            batch = next(self._batches)
        except StopIteration:
            # Lightning would swallow a StopIteration here and count the step as done.
            raise ValueError("the training data ended; the loader must repeat it (data.train)") from None
        self.keys.extend(batch.keys)
        self.tokens += batch.input_ids.numel()
        return batch.to(self._device)


def _loss(num_tokens: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The schedule's loss function: sum of ``output`` (float32 [L'], masked), its token count, both for the log."""
    total = output.float().sum()
    tokens = torch.tensor(num_tokens, dtype=torch.int, device=output.device)
    # A clone, not a detach: the schedule scales the returned loss in place.
    return total, tokens, {"sum": total.detach().clone(), "tokens": tokens.clone()}


def _forward_step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    return model(batch), partial(_loss, batch.num_loss_tokens)


def _run_schedule(
    model: torch.nn.Module,
    batches: _Recorder,
    num_microbatches: int,
    sequence_length: int,
    forward_only: bool,
) -> tuple[float, int]:
    """Runs the pipeline; returns the loss sum and loss tokens of the whole job, equal on all ranks."""
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    device = next(model.parameters()).device
    # float64: the sums of many micro batches keep every digit of their float32 losses.
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for output in outputs:
        totals += torch.stack([output["sum"].double(), output["tokens"].double()])
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # Only the last stage has seen a loss.
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, last, group=parallel_state.get_pipeline_model_parallel_group())
    return float(totals[0]), int(totals[1])


def _gather_counts(batches: _Recorder, device: torch.device) -> tuple[int, str]:
    """Tokens of all replicas, and a fingerprint of all their samples in order."""
    replicas = parallel_state.get_data_parallel_world_size()
    counts = torch.zeros(replicas, 2, dtype=torch.int64, device=device)
    digest = hashlib.sha256("\n".join(batches.keys).encode()).digest()
    counts[parallel_state.get_data_parallel_rank(), 0] = batches.tokens
    counts[parallel_state.get_data_parallel_rank(), 1] = int.from_bytes(digest[:8], "little", signed=True)
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    fingerprint = hashlib.sha256(repr(counts[:, 1].tolist()).encode()).hexdigest()[:16]
    return int(counts[:, 0].sum()), fingerprint


def train_step(
    state: TrainState, batches: Iterator[PackedBatch], num_microbatches: int, sequence_length: int, step: int
) -> StepResult:
    """Forward, backward, update and schedule for one global batch.

    Args:
        state: changed in place.
        batches: endless; ``num_microbatches`` are taken.
        num_microbatches: packed sequences this replica computes.
        sequence_length: tokens of a packed sequence (only a pipeline without variable lengths reads it).
        step: number of this step, from 1, for error messages.

    Returns:
        The step's result, equal on all ranks.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite. No checkpoint holds the step.
        ValueError: if the data ends.
    """
    device = next(state.ddp.parameters()).device
    recorder = _Recorder(batches, device)
    state.ddp.train()
    state.ddp.zero_grad_buffer()
    state.optimizer.zero_grad()
    loss_sum, loss_tokens = _run_schedule(state.ddp, recorder, num_microbatches, sequence_length, forward_only=False)
    loss = loss_sum / max(loss_tokens, 1)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss={loss} at step {step} over {loss_tokens} loss tokens; "
            f"samples of this rank: {', '.join(recorder.keys[:4])}; "
            "lower optim.lr, check those samples, or resume from an earlier checkpoint"
        )
    lr = max(group["lr"] / group["lr_mult"] for group in state.optimizer.param_groups)
    _, grad_norm, _ = state.optimizer.step()
    # Without clipping megatron computes no norm.
    grad_norm = float(grad_norm) if grad_norm is not None else 0.0
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"gradient norm={grad_norm} at step {step} (loss={loss}); "
            f"samples of this rank: {', '.join(recorder.keys[:4])}; "
            "lower optim.lr or check those samples; the run can go on from its last checkpoint"
        )
    state.scheduler.step(increment=1)
    tokens, samples = _gather_counts(recorder, device)
    return StepResult(loss, loss_tokens, tokens, grad_norm, lr, samples)


@torch.no_grad()
def evaluation_loss(
    model: torch.nn.Module, batches: Iterator[PackedBatch], num_microbatches: int, sequence_length: int
) -> tuple[float, int]:
    """Mean loss per loss token over ``num_microbatches`` of every replica, and that number of tokens."""
    was_training = model.training
    model.eval()
    recorder = _Recorder(batches, next(model.parameters()).device)
    loss_sum, loss_tokens = _run_schedule(model, recorder, num_microbatches, sequence_length, forward_only=True)
    model.train(was_training)
    return loss_sum / max(loss_tokens, 1), loss_tokens
