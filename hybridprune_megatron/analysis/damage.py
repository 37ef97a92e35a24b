"""What the answers lose to one drop: after which layer, to which share.

The measure is the Kullback-Leibler divergence of the answer tokens' distributions, every token against reduced: it
needs no labels, and it is much less noisy than accuracy.

Shape letters: A answer tokens, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybridprune_megatron.analysis.observe import Observation
from hybridprune_megatron.data.batch import IGNORE_LABEL, EncodedSample, PackedBatch, pack
from hybridprune_megatron.evaluation.forward import device_of, length_multiple, measuring
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


def divergence(full: Tensor, reduced: Tensor) -> float:
    """Mean over answer tokens of ``sum_v p_v (log p_v - log q_v)``, p of every token, q reduced.

    Args:
        full: [A, vocabulary] logits with every token.
        reduced: the same under a reduction.
    """
    p, q = full.float().log_softmax(-1), reduced.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def answer_logits(model: VideoLanguageModel, batch: PackedBatch) -> Tensor:
    """[A, vocabulary] of the tokens with a label, under the model's reduction.

    Args:
        model: in one process and in eval mode, see ``measuring``.
        batch: on the model's device.
    """
    return model.logits(batch, _answer_rows(batch))[0]


def drop_damages(
    model: VideoLanguageModel,
    sample: EncodedSample,
    reduction: Reduction,
    layers: Sequence[int],
    levels: Sequence[float],
) -> dict[int, list[float]]:
    """``s(l, q)`` of one sample: the divergence if one drop to the share q after layer l is the only one.

    One pass with every token; after each of the layers the rest of the model runs once per level, so that of N layers
    the prefixes are shared.

    Args:
        model: in one process.
        sample: with labels on the answer.
        reduction: ranks and selects; what it drops where is not read.
        layers: 0-based, rising, that can score; not the last one.
        levels: Q shares below 1; 0 leaves as few tokens as the reduction allows.

    Returns:
        By layer Q numbers.

    Raises:
        ValueError: the reduction drops before the model or ranks by hidden states.
    """
    with measuring(model, None):
        batch = pack([sample], length_multiple(model)).to(device_of(model))
        embeddings, layout = model.embedded(batch)
        assert embeddings is not None, "measuring refuses a part of a pipeline"
        return _damages(model, embeddings, layout, _answer_rows(batch), reduction, layers, levels)


def exposures(
    model: VideoLanguageModel, full: Observation, reduction: Reduction, layers: Sequence[int]
) -> dict[int, float]:
    """What the answer loses if as few visual tokens as the reduction allows (one) get past a layer, by that layer.

    Where it is nearly 0, nothing after the layer reads visual tokens any more: there a schedule may end.

    Args:
        full: of a prompt that is cut off before the answer, with nothing dropped.
    """
    assert full.embeddings is not None, "a pass leaves what it started from"
    last = torch.tensor([full.layout.num_tokens - 1], device=device_of(model))
    with measuring(model, None):
        found = _damages(model, full.embeddings, full.layout, last, reduction, layers, (0.0,))
    return {layer: values[0] for layer, values in found.items()}


def _damages(
    model: VideoLanguageModel,
    embeddings: Tensor,
    layout: TokenLayout,
    rows: Tensor,
    reduction: Reduction,
    layers: Sequence[int],
    levels: Sequence[float],
) -> dict[int, list[float]]:
    """See ``drop_damages``; rows: int64 [A], tokens whose distributions are compared."""
    scorer = reduction.scorer
    if reduction.front is not None or scorer is None:
        raise ValueError("damages are those of drops by a layer's own scores: set reduction.front=none, score=query")
    decoder, last = model.language_model.decoder, model.config.num_layers - 1
    run, hidden = decoder.layer_runner(), embeddings
    reduced: dict[int, list[Tensor]] = {}
    for layer in range(last + 1):
        hidden, scores = run(layer, hidden, layout, scorer if layer in layers else None)
        if layer not in layers:
            continue
        reduced[layer] = []
        for level in levels:
            retention = (1.0,) * (layer + 1) + (level,) * (last - layer)
            dropping = decoder.pass_of(replace(reduction, retention=retention), layout)
            left, rest = dropping.step(layer, hidden, layout, scores, decoder)
            left, rest = dropping.walk(range(layer + 1, last + 1), left, rest, run, decoder)
            reduced[layer].append(_logits(model, left, rest, rows))
    full = _logits(model, hidden, layout, rows)
    return {layer: [divergence(full, each) for each in found] for layer, found in reduced.items()}


def _logits(model: VideoLanguageModel, hidden: Tensor, layout: TokenLayout, rows: Tensor) -> Tensor:
    """[A, vocabulary] from hidden states after the last layer."""
    finished = model.language_model.decoder.finished(hidden)
    return model.language_model.row_logits(finished, layout, rows)[0].squeeze(1)


def _answer_rows(batch: PackedBatch) -> Tensor:
    return torch.nonzero(batch.labels != IGNORE_LABEL).flatten()
