"""What scoring, dropping and the reduction before the model cost, as ``hybridprune_megatron/method`` does them.

Every score and front counts itself; scores are computed in fp32 whatever the precision of the run, with decay in
float64. Here every block of logits counts as written and read once, for no kernel fuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import WIDTH, Cost, elementwise, most_similar_cost
from hybridprune_megatron.method.scorer import ScoreSizes

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig, ReductionConfig

_FP32, _INT64 = WIDTH["fp32"], 8


def scoring_operations(
    model: ModelConfig, reduction: ReductionConfig, symbol: str, tokens: int, visual: int, question: int, width: int
) -> Mapping[str, Cost]:
    """The score of one layer by what its mixer computes; nothing for scores that rank by its output.

    Args:
        reduction: the score and its keys.
        tokens: all tokens that enter the layer.
        visual: the visual ones of them.
        width: bytes of an activation.
    """
    kind = KINDS[symbol]
    heads, groups, channels = kind.score_sizes(model)
    return reduction.score.costs(kind.name, ScoreSizes(tokens, visual, question, heads, groups, channels, width))


def drop_operations(
    model: ModelConfig, reduction: ReductionConfig, visual: int, left: int, text: int, width: int
) -> Mapping[str, Cost]:
    """Ranking, copying the rows that stay and, if asked for, averaging the others into them.

    Args:
        reduction: the score, smoothing, the share of a frame, and what becomes of dropped tokens.
        visual: visual tokens before the drop.
        left: visual tokens after it.
        width: bytes of an activation.
    """
    hidden, how = model.hidden_size, reduction.select
    operations = {
        "rank": elementwise(2 * visual, _FP32) + elementwise(2 * visual, _INT64),
        "take": elementwise(2 * (left + text) * hidden, width),
    }
    if how.smoothing_frames:
        operations["smooth"] = elementwise(4 * visual * (2 * how.smoothing_frames + 1), _FP32)
    if how.frame_share:
        operations["frame"] = elementwise(4 * visual, _FP32)
    ranking = reduction.score.drop_costs(visual, left, hidden, width)
    operations |= ranking
    if how.dropped == "merge":
        if not reduction.score.pairs_tokens:
            operations["match"] = most_similar_cost(visual - left, left, hidden, width)
        operations["merge"] = elementwise((visual + left) * hidden, width)
    return operations


def front_operations(
    model: ModelConfig, reduction: ReductionConfig, visual: int, left: int, width: int
) -> Mapping[str, Cost]:
    """Reduction before the language model; nothing without one.

    Args:
        visual: visual tokens of the sample.
        left: visual tokens that it passes on.
        width: bytes of an activation.
    """
    if left == visual:
        return {}
    hidden, vision = model.hidden_size, model.vision
    pixels = 3 * round(vision.patch_size / vision.pixel_shuffle) ** 2 if vision is not None else 0
    operations = {"take": elementwise(2 * left * hidden, width)}
    return operations | dict(reduction.front.costs(visual, left, hidden, width, pixels))
