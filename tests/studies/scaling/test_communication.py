"""Bytes on the wire by hand, on the 12B model's widths: hidden 5,120, bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.layers.mamba import exchanged_channels
from studies.scaling.communication import Group, Transfer, Wires, all_gather, all_reduce, all_to_all

CFG = load_config(["experiment=nemotron_nano_12b_v2_vl"])


def _wires(nodes: int = 2, **parallel: Any) -> Wires:
    parallel.setdefault("sequence_parallel", parallel.get("tensor", 1) > 1)
    trainer = replace(CFG.trainer, num_nodes=nodes, global_batch_size=256)
    split = {"tensor": 1, **parallel}
    return Wires(replace(CFG, trainer=trainer, parallel=replace(CFG.parallel, **split)), 2)


def _sent(transfers: list[Transfer], *whats: str) -> dict[str, float]:
    sent = dict.fromkeys(("forward", "backward", "step"), 0.0)
    for each in transfers:
        if not whats or each.what in whats:
            sent[each.phase] += each.sent
    return {phase: size for phase, size in sent.items() if size}


def test_collectives():
    four = Group(4, 4)
    assert [each.sent for each in all_gather("x", "forward", four, 80)] == [60]
    assert sum(each.sent for each in all_reduce("x", "forward", four, 80)) == 120
    assert [each.sent for each in all_to_all("x", "forward", four, 80)] == [60]
    assert not all_gather("x", "forward", Group(1, 1), 80)
    assert not all_to_all("x", "forward", Group(1, 1), 80)


def test_what_leaves_the_node():
    # Two nodes of eight: one of eight rings crosses at each rank, while of 15 others 8 are elsewhere.
    ring, direct = Transfer("x", "forward", Group(16, 8), 150), Transfer("x", "forward", Group(16, 8), 150, ring=False)
    assert (ring.near, ring.far) == (150 * 7 / 8, 150 / 8)
    assert (direct.near, direct.far) == (70, 80)
    assert Transfer("x", "forward", Group(4, 4), 150).far == 0
    assert Transfer("x", "forward", Group(2, 1), 150, ring=False).far == 150


def test_links_work_at_once_and_every_hop_waits():
    ring = Transfer("x", "forward", Group(16, 8), 160)
    assert ring.seconds(near=100, far=10, hop=0) == pytest.approx(20 / 10)
    assert ring.seconds(near=1, far=10, hop=0) == pytest.approx(140)
    assert ring.seconds(near=100, far=10, hop=1) == pytest.approx(2 + 15)
    assert replace(ring, ring=False).seconds(near=100, far=1000, hop=1) == pytest.approx(160 * 7 / 15 / 100 + 1)


def test_groups_lie_on_nodes_as_megatron_numbers_ranks():
    wires = _wires(tensor=2, context=4, nodes=4)
    assert (wires.tensor, wires.context, wires.heads) == (Group(2, 2), Group(4, 4), Group(8, 8))
    # Context and data ranks of one tensor rank: 16, every second GPU.
    assert wires.data == Group(16, 4)
    wide = _wires(tensor=8, context=4, nodes=8)
    assert (wide.context, wide.heads, wide.data) == (Group(4, 1), Group(32, 8), Group(8, 1))


def test_tensor_parallel_layer():
    # 1,000 tokens of 5,120 in bf16, of which a rank sends half at every gather or scatter.
    half = 1000 * 5120 * 2 / 2
    transfers = _wires(tensor=2).layer("-", 1000)
    assert _sent(transfers) == {"forward": 2 * half, "backward": 3 * half}
    assert sum(each.sent for each in transfers if each.hidden) == 2 * half
    # Without sequence parallelism one all-reduce each way, as many bytes as a gather and a scatter.
    plain = _wires(tensor=2, sequence_parallel=False).layer("-", 1000)
    assert _sent(plain) == {"forward": 2 * half, "backward": 2 * half}
    assert not _wires().layer("M", 1000)


def test_context_parallel_layers():
    wires = _wires(tensor=2, context=2)
    # 500 tokens a rank; half of x (5,120), dt (64), B and C (4 groups of 128 each), and of y (5,120) go elsewhere.
    exchanged = 500 * (5120 + 64 + 2 * 4 * 128) * 2 / 2 + 500 * 5120 * 2 / 2
    assert _sent(wires.layer("M", 1000), "context") == {"forward": exchanged, "backward": exchanged}
    # Keys and values: 8 heads of 128 over 2 tensor ranks.
    gathered = 1000 * 2 * 1024 / 2 * 2 / 2
    assert _sent(wires.layer("*", 1000), "context") == {"forward": gathered, "backward": gathered}
    assert not _sent(wires.layer("-", 1000), "context")
    # The stream between layers is a context shard's.
    assert _sent(wires.layer("-", 1000), "tensor")["forward"] == 2 * 500 * 5120 * 2 / 2


def test_groups_shared_by_context_ranks_travel_to_each():
    assert exchanged_channels(CFG.model, 8, 1) == 1280 + 16 + 2 * 128
    assert exchanged_channels(CFG.model, 8, 4) == 1280 + 16 + 4 * 2 * 128


def test_reduction_of_tensor_parallel_ranks():
    wires = _wires(tensor=2)
    for symbol in "M*":
        transfers = wires.reduction(symbol, before=1000, after=600, visual=900, question=30)
        assert _sent(transfers, "scores") == {"forward": 900 * 4}
        # All rows before the drop are gathered, the gradients of those that are left too.
        assert _sent(transfers, "drop") == {"forward": 1000 * 5120, "backward": 600 * 5120}


def test_reduction_of_context_parallel_ranks():
    wires = _wires(context=4)
    mamba = wires.reduction("M", before=1000, after=600, visual=900, question=30)
    assert _sent(mamba, "scores") == {"forward": 2 * 900 * 4 * 3 / 4}
    # 150 rows a rank, three quarters from elsewhere at most.
    assert _sent(mamba, "drop") == {"forward": 150 * 5120 * 2 * 3 / 4, "backward": 150 * 5120 * 2 * 3 / 4}
    attention = wires.reduction("*", before=1000, after=600, visual=900, question=30)
    rows, log_sums, scores = 2 * 30 * 5120 * 2 * 3 / 4, 3 * 30 * 40 * 4, 1000 * 4 * 3 / 4
    assert _sent(attention, "scores") == {"forward": rows + log_sums + scores}


def test_a_reduction_without_scores_sends_rows_only():
    cfg = replace(CFG, reduction=replace(CFG.reduction, score="random"))
    transfers = Wires(cfg, 2).reduction("M", before=1000, after=600, visual=900, question=30)
    assert {each.what for each in transfers} == {"drop"}


def test_start_end_and_cut():
    wires = _wires(tensor=2, context=2)
    frames = _sent(wires.frames(tokens=1000, visual=800, sharers=wires.context))
    # Words of the whole sequence are summed over the vocabulary, frames gathered; the shard's gradient is gathered.
    assert frames == {"forward": (1000 + 800 / 2) * 5120 * 2, "backward": (800 / 2 + 500 / 2) * 5120 * 2}
    assert _sent(wires.head(1000)) == {"forward": 500 / 2 * 5120 * 2}
    # Between stages every tensor rank sends its part of the shard, with three columns for the index.
    assert _sent(wires.cut(1000, "backward")) == {"backward": 250 * 5123 * 2}


def test_gradients_and_parameters():
    wires = _wires(tensor=2, context=2, nodes=1)
    # Two context and two data ranks: gradients in fp32, weights in bf16.
    transfers = wires.step(gradients=4000)
    assert {each.what: each.sent for each in transfers} == {"gradients": 3000, "parameters": 1500}
    plain = _wires(tensor=2, context=2, nodes=1, distributed_optimizer=False, overlap_param_gather=False)
    assert _sent(plain.step(gradients=4000)) == {"step": 6000}
    # Two tensor ranks add up what they have of the tower and the projector.
    assert _sent(plain.step(gradients=4000, of_frames=1000)) == {"step": 6000 + 1000}
