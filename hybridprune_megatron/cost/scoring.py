"""What scoring, dropping and the reduction in front of the model cost.

Letters: T question tokens, V visual tokens that enter the layer, L all tokens that enter it, H heads, E head width,
G groups, N state size. Scores are computed in fp32 whatever the precision of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.layers import attention_widths
from hybridprune_megatron.cost.ops import Cost, elementwise

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, ReductionConfig
    from hybridprune_megatron.cost.prefill import Prompt

_FP32 = 4
_INT64 = 8


def scoring_operations(
    model: ModelConfig, reduction: ReductionConfig, symbol: str, visual: int, prompt: Prompt, width: int
) -> Mapping[str, Cost]:
    """The score of one layer.

    Args:
        model: dimensions.
        reduction: the scorer and its settings.
        symbol: M or *.
        visual: visual tokens that enter the layer.
        prompt: text and question.
        width: bytes of an activation.
    """
    if reduction.scorer in ("random", "uniform"):
        return {"score": elementwise(visual, _FP32)}
    if symbol == "*":
        return attention_score(model, visual + prompt.text, visual, prompt.question, width)
    if reduction.mamba_decay:
        return implicit_attention_score(model, visual, prompt.question, width)
    return decay_free_score(model, visual, prompt.question, width)


def attention_score(model: ModelConfig, tokens: int, visual: int, question: int, width: int) -> Mapping[str, Cost]:
    """Softmax mass of the question: one pass over all keys for the row sums, one over the visual keys for the columns.

    Two passes are what keeps the memory at O(T + L); each multiplies T rows with its keys in every head and writes and
    reads a block of logits.
    """
    queries, keys = attention_widths(model)
    passes = {}
    for name, columns in (("row sums", tokens), ("columns", visual)):
        flops = 2 * question * columns * queries
        logits = question * columns * model.num_attention_heads
        passes[name] = Cost(flops, flops, width * columns * keys + 2 * _FP32 * logits)
    return passes


def decay_free_score(model: ModelConfig, visual: int, question: int, width: int) -> Mapping[str, Cost]:
    """``dt_j B_j . Cbar``: one pass over B and dt. Plain torch multiplies and sums, so a profiler sees no product."""
    numbers = model.mamba_num_groups * model.mamba_state_dim
    read = width * (visual + question) * numbers + _FP32 * visual * (model.mamba_num_heads + 1)
    return {"score": Cost(2 * visual * numbers, 0, read)}


def implicit_attention_score(model: ModelConfig, visual: int, question: int, width: int) -> Mapping[str, Cost]:
    """``(C_i . B_j) exp(a_i - a_j) dt_j``: products a group, decays a head, both for every question token."""
    groups, state, heads = model.mamba_num_groups, model.mamba_state_dim, model.mamba_num_heads
    flops = 2 * question * visual * groups * state
    blocks = 2 * _FP32 * question * visual * (groups + heads)
    return {"score": Cost(flops, flops, width * (visual + question) * groups * state + blocks)}


def drop_operations(
    model: ModelConfig, reduction: ReductionConfig, visual: int, left: int, text: int, width: int
) -> Mapping[str, Cost]:
    """Ranking V scores and copying the rows that stay."""
    del reduction
    rows = left + text
    return {
        "rank": elementwise(2 * visual, _FP32) + elementwise(2 * visual, _INT64),
        "take": elementwise(2 * rows * model.hidden_size, width),
    }


def front_operations(
    model: ModelConfig, reduction: ReductionConfig, prompt: Prompt, left: int, width: int
) -> Mapping[str, Cost]:
    """Reduction in front of the language model; nothing without one."""
    del model, reduction, width
    if left == prompt.visual:
        return {}
    return {}
