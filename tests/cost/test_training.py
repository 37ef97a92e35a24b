"""Operations of a training step: from those of a prefill, piece by piece, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridprune_megatron.cost.prefill import Prompt, head_cost, prefill_cost
from hybridprune_megatron.cost.target import DEVICES, device_named
from hybridprune_megatron.cost.training import StepCost
from hybridprune_megatron.layers.operations import causal_pairs
from hybridprune_megatron.method.counts import PackSizes
from tests.models.tiny import tiny_config

#: One sample of 6 frames with 4 visual tokens each.
ONE = PackSizes(visual=(24,), text=(11,), question=(4,), loss_rows=2, frames=6, encoded=6)


def _forward(cfg, sizes=ONE):
    """The prefill of the cost model: layers, reduction, tower, projector; with the head's rows, those with a loss."""
    prompt = Prompt(sizes.visual[0], sum(sizes.visual) - sizes.visual[0] + sum(sizes.text), sizes.question[0], 6)
    found = prefill_cost(cfg.model, cfg.reduction, cfg.retention_by_layer, prompt, cfg.trainer.precision)
    head = head_cost(cfg.model, 1, sizes.loss_rows, 4).flops
    layers = sum(cost.flops for row in found.rows for cost in row.reduced.values())
    return layers, found.scoring.flops, found.vision["tower"].flops, found.vision["projector"].flops, head


def test_a_frozen_tower_is_counted_once_what_learns_three_times():
    cfg = tiny_config("model.trainable.vision=false", "model.trainable.projector=true")
    layers, scoring, tower, projector, head = _forward(cfg)
    assert scoring > 0
    assert StepCost(cfg).operations(ONE) == 3 * layers + scoring + tower + 3 * projector + 3 * head
    learning = tiny_config("model.trainable.vision=true", "model.trainable.projector=true")
    assert StepCost(learning).operations(ONE) - StepCost(cfg).operations(ONE) == 2 * tower


def test_by_hand():
    """Every product of the tiny model's layers, with nothing dropped and without a video."""
    cfg = tiny_config(pattern="M-M*M-", budget=1.0)
    tokens, hidden, vocab = 11, 32, 64
    # in_proj makes z and x (4 heads of 8), B and C (2 groups of 8), dt (4); out_proj takes 32.
    linears = tokens * hidden * (2 * 32 + 2 * 16 + 4) + tokens * 32 * hidden
    convolution = tokens * 4 * (32 + 32)
    # Chunks of 8: one whole and one of 3. A pair costs 16 for C.B and 32 for x; a state is written and read.
    scan = (causal_pairs(8) + causal_pairs(3)) * (2 * 8 + 4 * 8) + tokens * 2 * 4 * 8 * 8
    mlp = 2 * tokens * hidden * 64
    # 4 heads of 8 and two times 2 groups of 8.
    attention = tokens * hidden * (32 + 32) + tokens * 32 * hidden + 2 * causal_pairs(tokens) * 32
    products = 3 * (linears + convolution + scan) + 2 * mlp + attention + 2 * hidden * vocab
    text = PackSizes(visual=(0,), text=(tokens,), question=(4,), loss_rows=2, frames=0, encoded=0)
    assert StepCost(cfg).operations(text) == 3 * 2 * products


def test_adapters_spare_the_gradients_of_weights():
    whole = tiny_config("model.trainable.vision=false", "model.trainable.projector=false")
    adapted = tiny_config("model.trainable.vision=false", "model.trainable.projector=false", "tuning.lora.rank=4")
    layers, _, _, _, head = _forward(whole)
    spared = StepCost(whole).operations(ONE) - StepCost(adapted).operations(ONE)
    # All but attention's core and the scan with its convolution.
    assert 0.5 * (layers + head) < spared < layers + head


def test_a_drawn_budget_and_a_teacher_count():
    cfg = tiny_config()
    drawn = replace(ONE, retentions=(cfg.retention_at(1.0),))
    assert StepCost(cfg).operations(drawn) > StepCost(cfg).operations(ONE)
    teacher = ("tuning.distillation.weight=0.5", "tuning.distillation.teacher=self")
    layers, _, tower, projector, head = _forward(tiny_config(budget=1.0))
    more = StepCost(tiny_config(*teacher)).operations(ONE) - StepCost(cfg).operations(ONE)
    assert more == layers + tower + projector + head


def test_features_need_no_tower():
    cfg = tiny_config("model.trainable.vision=false")
    _, _, tower, _, _ = _forward(cfg)
    assert StepCost(cfg).operations(ONE) - StepCost(cfg).operations(replace(ONE, encoded=0)) == tower


def test_peaks_are_known_by_the_full_name_only():
    assert device_named("NVIDIA H200") is DEVICES["h200"]
    assert device_named("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    for other in ("NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu", ""):
        assert device_named(other) is None, other
    cfg = tiny_config("trainer.precision=bf16")
    assert StepCost(cfg).peak("NVIDIA H200") == 989e12
    assert StepCost(cfg).peak("NVIDIA H200 NVL") is None


def test_samples_share_a_sequence():
    """Two samples of a pack attend to themselves only, and cost what they do alone but for the scan's chunks."""
    cfg = tiny_config()
    two = PackSizes((24, 24), (11, 11), (4, 4), 4, 12, 12)
    alone, packed = StepCost(cfg).operations(ONE), StepCost(cfg).operations(two)
    assert packed == pytest.approx(2 * alone, rel=0.03)
