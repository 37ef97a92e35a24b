"""Times and memory of one language model on one sample of random embeddings, reduced and not, and of its peer.

Every measurement is of the same weights, embeddings and tokens; candidates take turns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.evaluation.forward import measuring
from hybridprune_megatron.evaluation.language_prefill import Prompt
from hybridprune_megatron.evaluation.timing import in_turn, synchronize
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.signals import Signals
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

#: Largest difference of logits from the peer's, relative to their largest.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
_ANSWER_TOKENS = 32


def check_peer(model: VideoLanguageModel, peer: Any, prompt: Prompt) -> float:
    """Largest difference of any logit from the peer's, relative to the largest logit.

    Raises:
        ValueError: it is above ``TOLERANCE``; nothing should be timed then.
    """
    with measuring(model, None):
        ours, _ = model.language_model(prompt.hidden, prompt.layout, prompt.dropping(model, None), None)
        theirs = peer(inputs_embeds=prompt.hidden.transpose(0, 1), use_cache=False).logits[0]
    return checked_difference(ours, theirs, TOLERANCE[prompt.hidden.dtype], "logits differ from transformers'")


def checked_difference(found: Tensor, expected: Tensor, allowed: float, what: str) -> float:
    """Largest difference of logits, relative to the largest one.

    Args:
        allowed: highest relative difference.
        what: begins the error, e.g. "logits differ from transformers'".

    Raises:
        ValueError: it is more.
    """
    difference = _relative_difference(found, expected)
    if not difference <= allowed:
        raise ValueError(f"{what} by {difference:.1e} of their largest, allowed {allowed:.0e}: nothing was timed")
    return difference


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_reduction(model: VideoLanguageModel, prompt: Prompt, reduction: Reduction) -> None:
    """The rows that the reduced model ends with are those of each layer run by itself on the tokens that it is to see.

    Raises:
        ValueError: they are not; nothing should be timed then.
    """
    from hybridprune_megatron.models.fp8 import layer_context, pass_context
    from hybridprune_megatron.models.packed import pack_for_layer

    trace: list[TokenLayout] = []
    decoder = model.language_model.decoder
    with measuring(model, None):
        dropping = prompt.dropping(model, reduction)
        found, left = model.language_model(prompt.hidden, prompt.layout, dropping, None, None, trace)
    hidden, layout = prompt.hidden, prompt.layout
    with measuring(model, None), pass_context(decoder.config):
        for layer, after in zip(decoder.layers, [*trace[1:], left], strict=True):
            with layer_context(decoder.config, layer.layer_number):
                out = layer(
                    hidden_states=hidden,
                    attention_mask=None,
                    packed_seq_params=pack_for_layer(layout, None, reduction.dt_filter, None),
                )
            hidden = out[0] if isinstance(out, tuple) else out
            stays = torch.isin(layout.origin, after.origin)
            hidden, layout = hidden[stays], after
        expected = model.language_model.output_layer(decoder.final_norm(hidden))[0].squeeze(1)
    counts = [sum(layout.visual_counts) for layout in trace]
    wanted = [sum(counts) for counts in dropping.counts]
    difference = _relative_difference(found, expected)
    if counts != wanted or not difference <= TOLERANCE[prompt.hidden.dtype]:
        raise ValueError(
            f"the reduced model keeps {counts} visual tokens (wanted {wanted}) and its logits differ by "
            f"{difference:.1e} from its layers run one by one: nothing was timed"
        )


class TimedScorer(Scorer):
    """A scorer that keeps the seconds it took.

    Args:
        scorer: of a mixer's signals.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.seconds = scorer, 0.0

    def pooling(self, kind: str) -> str:
        return self.scorer.pooling(kind)

    def score(self, signals: Signals, layout: TokenLayout, layer: int) -> Tensor:
        synchronize()
        start = time.perf_counter()
        scores = self.scorer.score(signals, layout, layer)
        synchronize()
        self.seconds += time.perf_counter() - start
        return scores


def time_scoring(model: VideoLanguageModel, prompt: Prompt, reduction: Reduction, rounds: int) -> list[float]:
    """Seconds that all scores of one reduced prefill take, by round."""
    assert reduction.scorer is not None, "a reduction that asks no mixer scores nothing"
    timed = TimedScorer(reduction.scorer)
    last, taken = prompt.layout.origin[-1:], []
    with measuring(model, None):
        for turn in range(rounds + 1):
            timed.seconds = 0.0
            dropping = prompt.dropping(model, replace(reduction, score=timed))
            model.language_model(prompt.hidden, prompt.layout, dropping, last)
            if turn:
                taken.append(timed.seconds)
    return taken


def time_training(
    model: VideoLanguageModel, prompt: Prompt, reduction: Reduction, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Forward and backward of the language model on one sample, all of its weights learning.

    Returns:
        Seconds by name in every round, and bytes of activations that autograd keeps between forward and backward.
    """
    layout = prompt.layout
    rows = layout.origin[-_ANSWER_TOKENS - 1 : -1]
    labels = rows % model.language_model.vocab_size
    hidden = prompt.hidden.detach().requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def loss(reduction: Reduction | None) -> Tensor:
        return model.language_model(hidden, layout, prompt.dropping(model, reduction), rows, labels)[0].sum()

    def step(reduction: Reduction | None) -> None:
        loss(reduction).backward()
        model.zero_grad(set_to_none=True)
        hidden.grad = None

    kept = {}
    model.train()
    reductions: Mapping[str, Reduction | None] = {"full": None, "reduced": reduction}
    for name, each in reductions.items():
        with _SavedBytes(own) as saved:
            loss(each)
        kept[name] = saved.total
    return in_turn({name: partial(step, each) for name, each in reductions.items()}, rounds), kept


class _SavedBytes:
    """Bytes of all storages that autograd keeps while it is on, parameters not counted.

    Args:
        own: addresses of the parameters' storages.
    """

    def __init__(self, own: set[int]) -> None:
        self.own, self.storages = own, dict[int, tuple[int, Tensor]]()

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self.storages.values())

    def __enter__(self) -> _SavedBytes:
        self._hooks: AbstractContextManager = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            # The tensor is held, so that its address is not given to another.
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor
