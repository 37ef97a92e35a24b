"""The native operators of ``kernels/`` on our own structures: scores, and the choice of tokens.

They equal the plain torch of ``query_formula`` and ``plan`` but for the rounding of float32 sums; what plain torch sums
in float64 they do, too, to the same bits. Of equal scores they keep the same. Shape letters as in ``query_formula``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.signals import AttentionSignals, HeldKeys, MambaSignals, ScoredSample


def attention_scores(
    ops: Any,
    signals: AttentionSignals,
    layout: TokenLayout,
    samples: Sequence[ScoredSample],
    causal: bool,
    pooling: str,
) -> Tensor:
    """float32 [J] ``attention_mass`` over the heads, for the keys that are here; 0 where nobody asks.

    Args:
        ops: from ``native``.
        signals: of one layer.
        layout: the packed sequence.
        samples: those that show something, in order.
        causal: as for ``attention_mass``.
        pooling: over heads, "mean" or "max".
    """
    q, k, held = signals.q, signals.k, signals.held
    if not samples:
        return k.new_zeros(len(k), dtype=torch.float32)
    key_ends, query_counts = [0], []
    for sample in samples:
        # What lies between two of them is a sample that nobody asks about.
        key_ends += [_num_held(held, sample.first), _num_held(held, sample.last)]
        query_counts += [0, len(sample.rows)]
    key_ends, query_counts = [*key_ends, len(k)], [*query_counts, 0]
    always_seen = None
    if not causal:
        always_seen = torch.zeros(layout.num_tokens, dtype=torch.bool, device=k.device)
        always_seen[layout.visual_index] = True
        always_seen = always_seen if held is None else always_seen[held.positions]
    inputs = (
        torch.cat([sample.rows for sample in samples]),
        torch.arange(len(k), device=k.device) if held is None else held.positions,
        always_seen,
        _offsets(query_counts, k.device),
        _on_device(key_ends, k.device),
    )
    q = torch.cat([q[sample.queries] for sample in samples])
    if held is None:
        return ops.attention_score(q, k, *inputs, pooling)
    log_sum = held.total(ops.attention_log_sum(q, k, *inputs))
    return ops.attention_mass(q, k, log_sum, *inputs, pooling)


def _num_held(held: HeldKeys | None, position: int) -> int:
    """How many of the keys that are here stand before a position."""
    return position if held is None else sum(rows.stop - rows.start for rows in held.rows(0, position))


def mamba_scores(
    ops: Any,
    signals: MambaSignals,
    layout: TokenLayout,
    samples: Sequence[ScoredSample],
    decay: bool,
    dt: bool,
    function: str,
    contrast: bool,
    pooling: str,
) -> Tensor:
    """float32 [V] ``implicit_attention`` over the heads, ``contrasted`` or not; other arguments as above."""
    device = signals.B.device
    log_decay = None
    if decay:
        log_decay = torch.zeros_like(signals.dt, dtype=torch.float64)
        for sample in samples:
            log_decay[sample.first : sample.last] = sample.log_decay(signals)
    return ops.mamba_score(
        signals.B,
        signals.C,
        signals.dt.float() if dt else None,
        log_decay,
        layout.visual_index,
        _offsets([len(sample.visual) for sample in samples], device),
        torch.cat([layout.query_index[:0], *(sample.rows for sample in samples)]),
        _offsets([len(sample.rows) for sample in samples], device),
        function,
        contrast,
        pooling,
    )


def highest(ops: Any, scores: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """int64, rising: the places of the highest scores of every run; of equal ones the first.

    Args:
        ops: from ``native``.
        scores: float32 [V].
        runs: lengths of runs and how many of each stay (host).
    """
    kept = [count for _, count in runs]
    offsets = _offsets([present for present, _ in runs], scores.device)
    return ops.select(scores, offsets, _offsets(kept, scores.device), sum(kept))


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """int64 [S + 1] running sum of host counts."""
    return _on_device([0, *accumulate(counts)], device)


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
