"""What crosses a pipeline boundary: hidden states, and with them which tokens of the packed sequence these are.

The stage after a boundary has the same batch and so knows every length, but which visual tokens are left was decided by
what the stages before computed. A few more columns beside the hidden states tell it; no message of their own, and no
exchange of shapes, for both sides compute them (``StageCommunicator``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

#: Columns that hold a token's index, one digit each. bf16 holds whole numbers up to 256, so three reach 2^24 tokens.
ORIGIN_COLUMNS = 3
_BASE = 256
# Tags of what goes down the layers and of gradients.
_FORWARD, _BACKWARD = 1, 2


def with_origin(hidden: Tensor, origin: Tensor) -> Tensor:
    """Puts the tokens' indices beside their hidden states.

    Args:
        hidden: [L, 1, D].
        origin: int64 [L] below 2^24.

    Returns:
        [L, 1, D + ORIGIN_COLUMNS].
    """
    digits = torch.stack([origin // _BASE**place % _BASE for place in range(ORIGIN_COLUMNS)], -1)
    return torch.cat([hidden, digits.unsqueeze(1).to(hidden.dtype)], -1)


def split_origin(received: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse: [L, 1, D] and int64 [L]."""
    hidden, digits = received.split([received.shape[-1] - ORIGIN_COLUMNS, ORIGIN_COLUMNS], -1)
    weights = _BASE ** torch.arange(ORIGIN_COLUMNS, device=received.device)
    return hidden, (digits.detach().squeeze(1).long() * weights).sum(-1)


class StageCommunicator(P2PCommunicator):
    """Megatron's communication between stages, told all shapes instead of exchanging them. For one pass of a schedule.

    Messages of one direction arrive in the order in which the schedule runs chunks of layers and micro-batches, which
    both sides know. Only the two directions can be taken for each other, where a stage is both before and after
    another (two stages, interleaved): gloo tells them apart by a tag, for nccl megatron gives each a group.

    Args:
        config: with ``variable_seq_lengths``, which makes megatron ask for shapes.
        input_shape: (chunk of this stage, micro-batch) -> shape of what the stage before sends for it.
        num_microbatches: of this pass.
        num_chunks: of layers on every stage; more than one in an interleaved pipeline.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        input_shape: Callable[[int, int], tuple[int, ...]],
        num_microbatches: int,
        num_chunks: int = 1,
    ) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self._input_shape = input_shape
        table = get_schedule_table(num_microbatches, num_chunks, config.microbatch_group_size_per_vp_stage)
        forward = [(chunk, microbatch) for microbatch, chunk in table]
        backward = [(num_chunks - 1 - chunk, microbatch) for chunk, microbatch in forward]
        first = 0 if self.is_pp_first_stage else None
        last = num_chunks - 1 if self.is_pp_last_stage else None
        # (chunk, micro-batch) of the messages of each kind, in their order.
        self._received = (key for key in forward if key[0] != first)
        self._sent_on = (key for key in forward if key[0] != last)
        self._returned = (key for key in backward if key[0] != last)
        # Of what was sent on, which is the shape of its gradient.
        self._shapes: dict[tuple[int, int], list[int]] = {}

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        if tensor_send_next is not None:
            self._shapes[next(self._sent_on)] = list(tensor_send_next.shape)
        before = list(self._input_shape(*next(self._received))) if recv_prev else []
        behind = self._shapes.pop(next(self._returned)) if recv_next else []
        return before, behind

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, dist.Work] | None]:
        if dist.get_backend(self.pp_group) != "gloo":
            return super()._communicate(
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                recv_prev=recv_prev,
                recv_next=recv_next,
                tensor_shape=tensor_shape,
                wait_on_reqs=wait_on_reqs,
            )
        before, behind = self._communicate_shapes(tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        empty = partial(torch.empty, requires_grad=True, dtype=self.config.pipeline_dtype)
        from_before = empty(before) if recv_prev else None
        from_behind = empty(behind) if recv_next else None
        works: dict[str, dist.Work] = {}
        for name, transfer, tensor, rank, tag in (
            ("recv_prev", dist.irecv, from_before, self.prev_rank, _FORWARD),
            ("recv_next", dist.irecv, from_behind, self.next_rank, _BACKWARD),
            ("send_next", dist.isend, tensor_send_next, self.next_rank, _FORWARD),
            ("send_prev", dist.isend, tensor_send_prev, self.prev_rank, _BACKWARD),
        ):
            work = transfer(tensor, rank, self.pp_group, tag) if tensor is not None else None
            if work is not None:
                works[name] = work
        if not wait_on_reqs:
            return from_before, from_behind, works
        for work in works.values():
            work.wait()
        return from_before, from_behind, None
