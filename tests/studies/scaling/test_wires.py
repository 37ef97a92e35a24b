"""Counted bytes against those that the collectives of a real step are given, forward and backward, on gloo."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_batch, tiny_config
from tests.parallel.run import PATTERN, RETENTION
from tests.worlds import run_world


class _Wire(TorchDispatchMode):
    """Bytes that this rank sends, by what collectives do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._follow(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _follow(self, name: str, args: tuple) -> None:
        group = torch.distributed.ProcessGroup.unbox(args[1 if name == "allreduce_" else 2])
        ranks = group.size()
        if name == "allreduce_":
            self.sent["ring"] += 2 * sum(tensor.nbytes for tensor in args[0]) * (ranks - 1) / ranks
        elif name == "_allgather_base_":
            self.sent["ring"] += args[1].nbytes * (ranks - 1)
        elif name == "_reduce_scatter_base_":
            self.sent["ring"] += args[1].nbytes * (ranks - 1) / ranks
        else:
            assert name == "alltoall_base_", name
            splits = args[4] or [1] * ranks
            share = splits[group.rank()] / max(sum(splits), 1)
            # Only a drop exchanges uneven parts.
            kind = "uneven" if args[4] else "even"
            self.sent[kind] += args[1].nbytes * (1 - share)


def _sent(tensor: int, context: int) -> tuple[Counter[str], Counter[str]]:
    """What a step sends, and what is counted."""
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.reduction_pass import ReductionPass
    from hybridprune_megatron.models import stage_cut
    from hybridprune_megatron.models.build import build_model
    from hybridprune_megatron.ops import packed_attention
    from studies.scaling import communication

    assert communication.ORIGIN_COLUMNS == stage_cut.ORIGIN_COLUMNS
    # Torch's own mask is a tensor of a class that no mode may see.
    packed_attention.causal_lower_right = lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).tril(
        columns - rows
    )
    cfg = tiny_config(
        f"parallel.tensor={tensor}",
        f"parallel.context={context}",
        f"parallel.sequence_parallel={tensor > 1}",
        f"trainer.devices={tensor * context}",
        "data.sequence_length=1024",
        "model.trainable.projector=true",
        "model.trainable.language=true",
        RETENTION,
        pattern=PATTERN,
        budget=0.25,
    )
    init_model_parallel(tensor, 1, context, seed=1)
    model, batch = build_model(cfg).train(), tiny_batch(60, pad_to_multiple_of=8)
    with _Wire() as wire:
        model(batch).sum().backward()
    layout = TokenLayout.from_samples(batch.layouts)
    dropping = ReductionPass.of(model.reduction, layout, 2 * context * tensor)
    visual = [sum(each) for each in dropping.counts]
    tokens = [layout.num_tokens - visual[0] + each for each in visual]
    wires = communication.Wires(cfg, 4)
    transfers = wires.frames(tokens[0], visual[0], wires.heads) + wires.head(tokens[-1])
    for layer, symbol in enumerate(PATTERN):
        transfers += wires.layer(symbol, tokens[layer])
        if layer + 1 < len(PATTERN) and visual[layer + 1] < visual[layer]:
            after, asking = tokens[layer + 1], len(layout.query_index)
            transfers += wires.reduction(symbol, tokens[layer], after, visual[layer], asking)
    counted: Counter[str] = Counter()
    for each in transfers:
        counted["ring" if each.ring else "uneven" if each.what == "drop" else "even"] += each.sent
    return wire.sent, counted


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2), (2, 2)])
def test_a_step_sends_what_is_counted(tensor: int, context: int):
    uneven: Counter[str] = Counter()
    for sent, counted in run_world(tensor * context, _sent, tensor, context):
        # Beside it go the two rows that have a loss, and their logits.
        assert counted["ring"] <= sent["ring"] <= 1.02 * counted["ring"], (sent, counted)
        assert sent["even"] == counted["even"], (sent, counted)
        uneven += Counter(sent=sent["uneven"], counted=counted["uneven"])
    # The count is a bound: rows that stay where they are do not travel.
    if context > 1:
        assert 0 < uneven["sent"] <= uneven["counted"], uneven
