"""Seconds of a step against sums by hand, on the 12B model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.cost.memory import Stage
from studies.scaling.assumptions import SOURCES, Assumptions, changed
from studies.scaling.scaling import Estimate, Layout, Scaling, Workload
from studies.scaling.step_time import Clock, together

CFG = load_config(["experiment=nemotron_nano_12b_v2_vl"])
PATTERN = CFG.model.hybrid_pattern
WORKLOADS = {budget: Workload.of(CFG, budget) for budget in (1.0, 0.5, 0.25)}
TP8 = Layout(8)
TOKENS = 131_072
BF16, HBM = 0.65 * 989e12, 0.8 * 3.35e12
# Cut in the middle.
HALVES = f"{PATTERN[:31]}|{PATTERN[31:]}"


def _estimate(
    layout: Layout = TP8,
    gpus: int = 8,
    batch: int = 4,
    recompute: str = "none",
    budget: float = 1.0,
    pattern: str = PATTERN,
    **assumptions: Any,
) -> Estimate:
    scaling = Scaling(WORKLOADS[budget], Assumptions(**assumptions), batch)
    return scaling.estimate(layout, gpus, recompute, pattern)


def test_products_by_hand():
    parts = _estimate().step.parts
    inner, rows = 128 * 80, 2 * 128 * 80 + 2 * 8 * 128 + 128
    per_token = 28 * 2 * 5120 * (rows + inner) + 28 * 4 * 5120 * 20480 + 6 * 2 * 5120 * (5120 + 2 * 1024 + 5120)
    # Forward once, backward twice, an eighth on every rank, four micro-batches.
    assert parts["linears"] == pytest.approx(4 * 3 * per_token * TOKENS / 8 / BF16)
    pairs = TOKENS * (TOKENS + 1) / 2
    assert parts["attention"] == pytest.approx(4 * 3.5 * 6 * 4 * 5120 * pairs / 8 / (0.5 * 989e12))


def test_recomputation_adds_a_forward_pass():
    none, selective, full = (_estimate(recompute=each).step for each in ("none", "selective", "full"))
    assert full.parts["linears"] == pytest.approx(4 / 3 * none.parts["linears"])
    assert selective.parts["linears"] == none.parts["linears"]
    for each in (selective, full):
        assert each.parts["attention"] == pytest.approx(4.5 / 3.5 * none.parts["attention"])
        assert each.parts["scan"] == pytest.approx(4 / 3 * none.parts["scan"])
        assert each.parts["tower, projector"] == none.parts["tower, projector"]
    # Two gathers of the stream a layer and micro-batch more.
    again = 4 * 62 * 2 * TOKENS * 5120 * 2 * 7 / 8
    assert full.near["tensor"] - none.near["tensor"] == pytest.approx(again)
    assert selective.near == none.near


def test_recomputed_attention_gathers_its_keys_again():
    none, selective, full = (_estimate(Layout(4, 2), recompute=each).step for each in ("none", "selective", "full"))
    keys = 4 * 6 * TOKENS * 2 * 1024 / 4 * 2 / 2
    assert selective.near["context"] - none.near["context"] == pytest.approx(keys)
    assert full.near["context"] > selective.near["context"]


def test_gathers_beside_products_are_hidden_as_far_as_there_is_room():
    seconds = TOKENS * 5120 * 2 * 7 / 8 / (0.8 * 450e9)
    # Forward twice and backward once a layer, once before the head.
    exposed = 4 * (62 * 3 + 1) * seconds
    # The few products of an attention layer leave a rest of backward's two others.
    products = 2 * 2 * 5120 * (5120 + 2 * 1024 + 5120) * TOKENS / 8 / BF16
    exposed += 4 * 6 * (2 * seconds - 0.8 * products)
    assert _estimate(hop=0.0).step.parts["wire: tensor"] == pytest.approx(exposed)
    nothing_hides = _estimate(hop=0.0, overlap=0.0).step.parts["wire: tensor"]
    assert nothing_hides == pytest.approx(4 * (62 * 5 + 1) * seconds)


def test_frames_are_divided_as_assumed():
    vision = [_estimate(Layout(4, 2), frames_over=each).step.parts["tower, projector"] for each in ("context", "model")]
    # 481 frames over 2 and over 8 ranks.
    assert vision[1] / vision[0] == pytest.approx(61 / 241)
    features = _estimate(Layout(4, 2), frames_over="features").step.parts["tower, projector"]
    assert features < 0.3 * vision[0]


def test_bubble_and_busiest_stage():
    layout, batch = Layout(4, 1, 2), 8
    step = _estimate(layout, batch=batch, pattern=HALVES).step
    cfg = Scaling(WORKLOADS[1.0], Assumptions(), batch).configure(layout, 8, "none", HALVES)
    clock = Clock(cfg, WORKLOADS[1.0].prefill, Assumptions())
    halves = [together(clock.layers[:31]).seconds + clock.frames.seconds, together(clock.layers[31:]).seconds]
    assert step.parts["bubble"] == pytest.approx(min(halves), rel=0.01)
    rest = step.seconds - step.parts["bubble"]
    assert rest == pytest.approx(batch * max(halves), rel=0.01)
    # One hidden state forward or its gradient backward for each micro-batch.
    assert step.near["pipeline"] == batch * TOKENS * 5123 * 2 / 4


def test_gradients_wait_only_for_what_backward_does_not_hide():
    beside, alone = (_estimate(gpus=64, batch=8, overlap=overlap).step for overlap in (0.8, 0.0))
    assert "wire: gradients" not in beside.parts
    gradients = Stage(_estimate(gpus=64, batch=8).cfg, 0).static().gradients
    assert alone.far["gradients"] == pytest.approx(gradients * 7 / 8)
    assert alone.parts["wire: gradients"] == pytest.approx(gradients * 7 / 8 / (0.8 * 50e9) + 7 * 5e-6)


def test_the_optimizer_passes_over_its_states():
    estimate = _estimate(gpus=64, batch=8)
    static = Stage(estimate.cfg, 0).static()
    traffic = 2 * static.optimizer + 2 * static.gradients + static.weights
    assert estimate.step.parts["optimizer"] == pytest.approx(traffic / HBM)


def test_fp8_halves_neither_attention_nor_the_tower():
    bf16, fp8 = _estimate().step.parts, _estimate(fp8=True).step.parts
    assert fp8["linears"] / bf16["linears"] == pytest.approx(BF16 / (0.5 * 1979e12))
    for name in ("attention", "scan", "tower, projector"):
        assert fp8[name] == bf16[name]


def test_every_assumption_is_explained():
    rows = Assumptions().rows()
    assert {name for name, *_ in rows} == set(SOURCES)
    assert all(value and what and source for _, value, what, source in rows)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lineer=0.5", "lineer=0.5: unknown assumption; allowed are fp8_flops, "),
        ("linear=half", "linear=half: has the wrong type; give e.g. linear=0.65"),
        ("fp8=yes", "fp8=yes: has the wrong type; give e.g. fp8=false"),
        ("linear=1.5", "linear=1.5: is a share above 0 and at most 1"),
        ("overlap=-1", "overlap=-1.0: is a share from 0 to 1"),
        ("network=0", "network=0.0: must be above 0"),
        ("hop=-1", "hop=-1.0: must be 0 seconds or more"),
        ("frames_over=tensor", "frames_over=tensor: allowed are context, model and features"),
    ],
)
def test_a_wrong_assumption_is_one_line(setting: str, message: str):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        changed(Assumptions(), [setting])


def test_assumptions_are_set_by_name():
    assert changed(Assumptions(), ["fp8=true", "linear=0.5"]) == replace(Assumptions(), fp8=True, linear=0.5)
