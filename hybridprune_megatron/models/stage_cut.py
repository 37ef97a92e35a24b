"""What crosses a pipeline stage cut: hidden states, and with them which tokens of the packed sequence these are.

The stage behind a cut has the same batch and so knows every length, but which visual tokens are left was decided by
what the stages before computed. A few more columns beside the hidden states tell it; no message of their own, and no
exchange of shapes, for both sides compute them (``StageCommunicator``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

#: Columns that hold a token's index, one digit each. bf16 holds whole numbers up to 256, so three reach 2^24 tokens.
ORIGIN_COLUMNS = 3
_BASE = 256


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

    Args:
        config: with ``variable_seq_lengths``, which makes megatron ask for shapes.
        next_shape: shape of what the stage before sends for the next micro-batch, called once for each in order.
    """

    def __init__(self, config: ModelParallelConfig, next_shape: Callable[[], tuple[int, ...]]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self._next_shape = next_shape
        # Of what was sent on, whose gradients come back in the same order and shape.
        self._sent: deque[tuple[int, ...]] = deque()

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Any, Any]:
        if tensor_send_next is not None:
            self._sent.append(tuple(tensor_send_next.shape))
        before = list(self._next_shape()) if recv_prev else [0, 0, 0]
        behind = list(self._sent.popleft()) if recv_next else [0, 0, 0]
        return before, behind
