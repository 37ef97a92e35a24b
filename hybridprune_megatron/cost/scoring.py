"""What scoring, dropping and the reduction in front of the model cost, as ``hybridprune_megatron/method`` does them.

Letters: T rows that score, V visual tokens that enter the layer, L all tokens that enter it, H heads, E head width,
G groups, N state size, D hidden size. Scores are computed in fp32 whatever the precision of the run, with decay in
float64. Here every block of logits counts as written and read once, for no kernel fuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.layers import attention_widths
from hybridprune_megatron.cost.ops import Cost, elementwise

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, ReductionConfig

_FP32 = 4
_INT64 = 8


def scoring_operations(
    model: ModelConfig, reduction: ReductionConfig, symbol: str, tokens: int, visual: int, question: int, width: int
) -> Mapping[str, Cost]:
    """The score of one layer by what its mixer computes; nothing for scorers that rank by its output.

    Args:
        model: dimensions.
        reduction: the scorer and its settings.
        symbol: M or *.
        tokens: all tokens that enter the layer.
        visual: the visual ones of them.
        question: tokens of the question.
        width: bytes of an activation.
    """
    if reduction.scorer in ("random", "uniform"):
        return {"score": elementwise(visual, _FP32)}
    if reduction.scorer != "query":
        return {}
    rows = 1 if reduction.query_rows == "last" else question
    if symbol == "*":
        return attention_score(model, tokens, visual, rows, width)
    if reduction.mamba_function == "identity" and not reduction.mamba_decay:
        return decay_free_score(model, visual, rows, width)
    return implicit_attention_score(model, reduction, visual, rows, width)


def attention_score(model: ModelConfig, tokens: int, visual: int, rows: int, width: int) -> Mapping[str, Cost]:
    """Softmax mass of the question: one pass over all keys for the row sums, one over the visual keys for the columns.

    Two passes are what keeps the memory at O(T + L); each multiplies T rows with its keys in every head.
    """
    queries, keys = attention_widths(model)
    passes = {}
    for name, columns in (("row sums", tokens), ("columns", visual)):
        flops = 2 * rows * columns * queries
        logits = rows * columns * model.num_attention_heads
        passes[name] = Cost(flops, flops, width * columns * keys + 2 * _FP32 * logits)
    return passes


def decay_free_score(model: ModelConfig, visual: int, rows: int, width: int) -> Mapping[str, Cost]:
    """``dt_j B_j . Cbar``: one pass over B and dt. Plain torch multiplies and sums, so a profiler sees no product."""
    numbers = model.mamba_num_groups * model.mamba_state_dim
    read = width * (visual + rows) * numbers + _FP32 * visual * (model.mamba_num_heads + 1)
    return {"score": Cost(2 * visual * numbers, 0, read)}


def implicit_attention_score(
    model: ModelConfig, reduction: ReductionConfig, visual: int, rows: int, width: int
) -> Mapping[str, Cost]:
    """``f(C_i . B_j dt_j [exp(a_i - a_j)])``: T x V products a group; with decay or softmax T x V numbers a head.

    The softmax takes two passes, as in attention.
    """
    groups, state, heads = model.mamba_num_groups, model.mamba_state_dim, model.mamba_num_heads
    softmax = reduction.mamba_function == "softmax"
    passes = 2 if softmax else 1
    flops = 2 * rows * visual * groups * state * passes
    numbers = rows * visual * (groups + (heads if softmax or reduction.mamba_decay else 0)) * passes
    read = width * (visual * passes + rows) * groups * state
    logit = 2 * _FP32 if reduction.mamba_decay else _FP32
    return {"score": Cost(flops, flops, read + 2 * logit * numbers)}


def drop_operations(
    model: ModelConfig, reduction: ReductionConfig, visual: int, left: int, text: int, width: int
) -> Mapping[str, Cost]:
    """Ranking, copying the rows that stay and, if asked for, averaging the others into them.

    Args:
        model: dimensions.
        reduction: the scorer, smoothing, the share of a frame, and what becomes of dropped tokens.
        visual: visual tokens before the drop.
        left: visual tokens after it.
        text: all other tokens.
        width: bytes of an activation.
    """
    hidden = model.hidden_size
    operations = {
        "rank": elementwise(2 * visual, _FP32) + elementwise(2 * visual, _INT64),
        "take": elementwise(2 * (left + text) * hidden, width),
    }
    if reduction.smoothing_frames:
        operations["smooth"] = elementwise(4 * visual * (2 * reduction.smoothing_frames + 1), _FP32)
    if reduction.frame_share:
        operations["frame"] = elementwise(4 * visual, _FP32)
    if reduction.scorer == "utrc":
        # Of the less important half every token is compared with all of the other half.
        less = max(visual // 2, visual - left)
        operations["importance"] = elementwise(visual * hidden, width)
        operations["match"] = _most_similar(less, visual - less, hidden, width)
    elif reduction.dropped == "merge":
        operations["match"] = _most_similar(visual - left, left, hidden, width)
    if reduction.dropped == "merge":
        operations["merge"] = elementwise((visual + left) * hidden, width)
    return operations


def front_operations(
    model: ModelConfig, reduction: ReductionConfig, visual: int, left: int, width: int
) -> Mapping[str, Cost]:
    """Reduction in front of the language model; nothing without one.

    Args:
        model: dimensions.
        reduction: the front.
        visual: visual tokens of the sample.
        left: visual tokens that it hands on.
        width: bytes of an activation.
    """
    if reduction.front == "none" or left == visual:
        return {}
    hidden = model.hidden_size
    operations = {"take": elementwise(2 * left * hidden, width)}
    if reduction.front == "evs":
        # x . y, x . x and y . y with the patch one frame before; elementwise in plain torch.
        operations["change"] = Cost(6 * visual * hidden, 0, 2 * visual * hidden * width)
    if reduction.front == "evs_pixels" and model.vision is not None:
        pixels = 3 * round(model.vision.patch_size / model.vision.pixel_shuffle) ** 2
        operations["change"] = elementwise(2 * visual * pixels, 1)
    if reduction.front == "tome":
        alive, match = visual, Cost()
        while alive > left:
            # A round matches every other token to the rest and may merge all of those.
            sources, targets = (alive + 1) // 2, alive // 2
            match += _most_similar(sources, targets, hidden, _FP32)
            alive -= targets
        operations["match"] = match
    return operations


def _most_similar(rows: int, candidates: int, hidden: int, width: int) -> Cost:
    """Cosines of all rows with all candidates; blocks of them are written and read once."""
    flops = 2 * rows * candidates * hidden
    return Cost(flops, flops, width * (rows + candidates) * hidden + 2 * _FP32 * rows * candidates)
