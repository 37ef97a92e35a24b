"""Decoding in the code of an export, over the caches of a reduced and of a full prefill, and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.evaluation.benchmark import TOLERANCE, checked_difference
from hybridprune_megatron.evaluation.forward import measuring
from hybridprune_megatron.evaluation.language_prefill import Prompt
from hybridprune_megatron.evaluation.timing import in_turn
from hybridprune_megatron.export.cache import HybridCache
from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.export.modeling_hybridprune import HybridLanguageModel
from hybridprune_megatron.export.write import hf_weights, language_settings
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

_PREFIX = "language_model."
#: Tokens that are decoded and timed together.
TOKENS = 16


def exported_model(model: VideoLanguageModel, cfg: Config) -> HybridLanguageModel:
    """The language model as an export computes it, with the same weights on the same device.

    Args:
        model: unsplit.
    """
    with torch.device("meta"):
        exported = HybridLanguageModel(HybridPruneConfig(**language_settings(cfg.model)))
    device = next(model.language_model.parameters()).device
    weights = {
        name.removeprefix(_PREFIX): value.to(device)
        for name, value in hf_weights(model, cfg).items()
        if name.startswith(_PREFIX)
    }
    if cfg.model.tie_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    exported.load_state_dict(weights, assign=True)
    return exported.eval()


def check_decoding(
    model: VideoLanguageModel, exported: HybridLanguageModel, sample: SampleLayout, reduction: Reduction | None
) -> float:
    """Largest difference, relative to the largest logit, of a decoded token from a prefill with it in ``model``.

    Args:
        model: of training.
        exported: the same weights.
        sample: gets one more token of text.
        reduction: what is dropped in prefill; a token of text after the question changes nothing of that.

    Raises:
        ValueError: it is above ``TOLERANCE``; nothing should be timed then.
    """
    longer = Prompt.of(model, SampleLayout((*sample.spans, Span(TokenKind.TEXT, 1))))
    shorter = Prompt(TokenLayout.from_samples([sample], longer.hidden.device), longer.hidden[:-1])
    with measuring(model, None):
        dropping = longer.dropping(model, reduction)
        expected, _ = model.language_model(longer.hidden, longer.layout, dropping, longer.layout.origin[-1:])
    with torch.no_grad():
        found = _decoded(exported, longer.hidden[-1], _prefilled(exported, shorter, reduction))
    allowed = TOLERANCE[longer.hidden.dtype]
    return checked_difference(found, expected, allowed, "a decoded token's logits differ from a prefill's")


def time_decoding(
    exported: HybridLanguageModel, peer: Any, prompt: Prompt, reduction: Reduction, rounds: int
) -> dict[str, list[float]]:
    """Seconds a token, in turn: over full caches, over reduced ones, in transformers.

    Args:
        exported: from ``exported_model``.
        peer: transformers' model; None: left out.
        prompt: what the caches hold.
        reduction: what is dropped from them.
        rounds: how often ``TOKENS`` tokens are timed.
    """
    # Whatever the tokens are, they cost the same.
    token = prompt.hidden[-1]
    with torch.no_grad():
        caches = {name: _prefilled(exported, prompt, each) for name, each in (("full", None), ("reduced", reduction))}

        def decode(cache: HybridCache) -> Callable[[], object]:
            return lambda: [_decoded(exported, token, cache) for _ in range(TOKENS)]

        candidates = {name: decode(cache) for name, cache in caches.items()}
        if peer is not None:
            held = peer(inputs_embeds=prompt.hidden.transpose(0, 1), use_cache=True, logits_to_keep=1).past_key_values

            def decode_theirs() -> object:
                return [
                    peer(inputs_embeds=token.unsqueeze(0), past_key_values=held, use_cache=True) for _ in range(TOKENS)
                ]

            candidates["transformers"] = decode_theirs
        taken = in_turn(candidates, rounds)
    return {name: [seconds / TOKENS for seconds in each] for name, each in taken.items()}


def _prefilled(exported: HybridLanguageModel, prompt: Prompt, reduction: Reduction | None) -> HybridCache:
    cache = HybridCache()
    dropping = ReductionPass.of(reduction, prompt.layout)
    exported.backbone.prefill(prompt.hidden.squeeze(1), prompt.layout, dropping, cache, None)
    return cache


def _decoded(exported: HybridLanguageModel, token: Tensor, cache: HybridCache) -> Tensor:
    """Logits [1, vocabulary] after one more token [1, D]."""
    return exported.logits(exported.backbone.step(token, cache))
