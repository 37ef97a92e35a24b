"""Scoring, merging and fronts: products as torch's flop counter sees them in the real code, and counts by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.cost.prefill import Prompt, prefill_cost
from hybridprune_megatron.cost.scoring import drop_operations, front_operations, scoring_operations
from hybridprune_megatron.layers.operations import sum_costs
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.settings import Select
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals

CFG = load_config(["experiment=demo"])
MODEL = CFG.model
FRAMES, PER_FRAME, QUESTION, TEXT = 9, 5, 7, 12
VISUAL, TOKENS = FRAMES * PER_FRAME, FRAMES * PER_FRAME + TEXT
SETTINGS: list[dict[str, Any]] = [
    {},
    {"query_rows": "last"},
    {"attention_pooling": "max"},
    {"mamba_decay": True},
    {"mamba_function": "abs"},
    {"mamba_function": "softmax"},
    {"mamba_function": "softmax", "mamba_decay": True},
    {"mamba_pooling": "max_groups", "mamba_function": "relu", "mamba_dt": False},
    {"name": "random"},
    {"name": "uniform"},
]
DROPS: list[dict[str, Any]] = [
    {"select": Select(dropped="merge")},
    {"score": "utrc", "select": Select(dropped="merge")},
    {"score": "utrc", "select": Select()},
    {"select": Select(smoothing_frames=1)},
    {"select": Select(frame_share=0.1)},
]


def _layout() -> TokenLayout:
    frames = [Span(TokenKind.FRAME, PER_FRAME, 0, frame) for frame in range(FRAMES)]
    text = [Span(TokenKind.QUESTION, QUESTION), Span(TokenKind.TEXT, TEXT - QUESTION - 2)]
    return TokenLayout.from_samples([SampleLayout((Span(TokenKind.TEXT, 2), *frames, *text))], "cpu")


def _profiled(run, *args) -> int:
    # Native operators tell no profiler what they multiply.
    plain = patch.dict(os.environ, {"HYBRIDPRUNE_KERNELS": "0"})
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*args)
    return counter.get_total_flops()


def _signals(symbol: str) -> AttentionSignals | MambaSignals:
    if symbol == "*":
        heads, keys, width = MODEL.num_attention_heads, MODEL.num_query_groups, MODEL.kv_channels
        return AttentionSignals.of(torch.randn(TOKENS, heads, width), torch.randn(TOKENS, keys, width), _layout())
    groups, state, heads = MODEL.mamba_num_groups, MODEL.mamba_state_dim, MODEL.mamba_num_heads
    B, C = torch.randn(2, TOKENS, groups, state)
    return MambaSignals(B, C, torch.rand(TOKENS, heads), -torch.rand(heads))


@pytest.mark.parametrize("symbol", ["M", "*"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_scores_multiply_what_is_counted(settings: dict[str, Any], symbol: str):
    reduction = replace(CFG.reduction, score={"name": "query", **settings})
    counted = scoring_operations(MODEL, reduction, symbol, TOKENS, VISUAL, QUESTION, 4)
    profiled = _profiled(reduction.score.score, _signals(symbol), _layout(), 0)
    assert profiled == sum_costs(counted.values()).executed


def test_scores_by_hand():
    reduction = CFG.reduction
    attention = scoring_operations(MODEL, reduction, "*", TOKENS, VISUAL, QUESTION, 4)
    # 4 heads of width 32: 7 rows with all 57 keys, then with the 45 visual ones.
    assert attention["row sums"].flops == 7 * 57 * 4 * 32 * 2
    assert attention["columns"].flops == 7 * 45 * 4 * 32 * 2
    # 2 key heads read, 4 heads of logits written and read.
    assert attention["columns"].bytes == 4 * 45 * 2 * 32 + 2 * 4 * 7 * 45 * 4
    mamba = scoring_operations(MODEL, reduction, "M", TOKENS, VISUAL, QUESTION, 2)
    # 2 groups of 32 states, 8 heads of dt, one score; contrast reads all of it twice.
    assert mamba["score"].flops == 2 * 45 * 2 * 32 * 2
    assert mamba["score"].bytes == 2 * (2 * (45 + 7) * 64 + 4 * 45 * 8 + 4 * 45)
    signed = replace(reduction, score={"name": "query", "mamba_contrast": False})
    once = scoring_operations(MODEL, signed, "M", TOKENS, VISUAL, QUESTION, 2)["score"]
    assert (2 * once.flops, 2 * once.bytes) == (mamba["score"].flops, mamba["score"].bytes)


@pytest.mark.parametrize("settings", DROPS)
@pytest.mark.parametrize("left", [1, 20, 44])
def test_drops_multiply_what_is_counted(settings: dict[str, Any], left: int):
    settings_of = replace(CFG.reduction, **settings)
    reduction = settings_of.policy("**", retention=(1.0, left / VISUAL))
    scores = None if reduction.output_scorer else torch.rand(VISUAL)
    dropping = ReductionPass(reduction, ((VISUAL,), (left,)))
    profiled = _profiled(dropping.step, 0, torch.randn(TOKENS, 1, MODEL.hidden_size), _layout(), scores)
    counted = drop_operations(MODEL, settings_of, VISUAL, left, TEXT, 4)
    assert profiled == sum_costs(counted.values()).executed


@pytest.mark.parametrize("front", ["tome", "evs", "uniform"])
@pytest.mark.parametrize("left", [5, 20, 44])
def test_fronts_multiply_what_is_counted(front: str, left: int):
    reduction = replace(CFG.reduction, budget=0.1, front={"name": front, "retention": left / VISUAL})
    profiled = _profiled(reduction.front.rank, torch.randn(VISUAL, MODEL.hidden_size), None, _layout(), [left])
    assert profiled == sum_costs(front_operations(MODEL, reduction, VISUAL, left, 4).values()).executed


@pytest.mark.parametrize("option", group_options(CONF_DIR, "reduction"))
@pytest.mark.parametrize("frames", [2, 9])
def test_tokens_are_those_that_the_method_keeps(option: str, frames: int):
    # Deep enough for a mean of 0.25 by attention layers alone.
    cfg = load_config(["experiment=nemotron_nano_12b_v2_vl", f"reduction={option}"])
    per_frame = cfg.model.vision.tokens_per_frame
    shown = [Span(TokenKind.FRAME, per_frame, 0, frame) for frame in range(frames)]
    layout = TokenLayout.from_samples([SampleLayout((*shown, Span(TokenKind.QUESTION, TEXT)))])
    dropping = ReductionPass.of(cfg.reduction.policy(cfg.model.hybrid_pattern), layout)
    kept = [dropping.entering(layer, layout)[0] for layer in range(cfg.model.num_layers)]
    prompt = Prompt(frames * per_frame, TEXT, TEXT, frames)
    prefill = prefill_cost(cfg.model, cfg.reduction, cfg.retention_by_layer, prompt, "fp32")
    assert [row.visual for row in prefill.rows] == kept
