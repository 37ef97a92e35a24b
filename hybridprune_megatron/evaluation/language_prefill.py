"""The language model's prefill alone, from embeddings to one row of logits: timed whole, and piece by piece.

The pieces, timed at other lengths, are what ``cost.calibration`` predicts a whole prefill from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.evaluation.forward import device_of, measuring
from hybridprune_megatron.evaluation.timing import in_turn
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.schedule import layer_symbols
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.signals import Signals
from hybridprune_megatron.models.packed import LayerPacking, pack_for_layer
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

# Share of the visual tokens that a timed drop keeps.
_KEPT_IN_A_DROP = 0.9


def one_sample(visual: int, text: int, question: int, tokens_per_frame: int = 256) -> SampleLayout:
    """Some text, a video, the question, an answer's start.

    Args:
        visual: visual tokens, in frames of ``tokens_per_frame`` and what is left over.
        question: those of them that ask.
        tokens_per_frame: visual tokens of a frame.
    """
    sizes = [tokens_per_frame] * (visual // tokens_per_frame)
    sizes += [visual % tokens_per_frame] if visual % tokens_per_frame else []
    frames = [Span(TokenKind.FRAME, size, 0, frame) for frame, size in enumerate(sizes)]
    rest = text - question
    before = [Span(TokenKind.TEXT, rest - rest // 2)] if rest else []
    after = [Span(TokenKind.TEXT, rest // 2)] if rest // 2 else []
    return SampleLayout((*before, *frames, Span(TokenKind.QUESTION, question), *after))


@dataclass(frozen=True)
class Prompt:
    """One sample as embeddings.

    Attributes:
        layout: what every token is.
        hidden: [L, 1, D].
    """

    layout: TokenLayout
    hidden: Tensor

    @staticmethod
    def of(model: VideoLanguageModel, sample: SampleLayout) -> Prompt:
        """Random embeddings, the same for every model of a width."""
        layout = TokenLayout.from_samples([sample], device_of(model))
        weight = next(model.language_model.parameters())
        values = torch.randn(layout.num_tokens, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        return Prompt(layout, values.to(weight.device, weight.dtype))

    def dropping(self, model: VideoLanguageModel, reduction: Reduction | None) -> ReductionPass:
        """What is dropped in a pass over it."""
        return model.language_model.decoder.pass_of(reduction, self.layout)


def time_prefill(
    model: VideoLanguageModel, prompt: Prompt, reductions: Mapping[str, Reduction | None], rounds: int, peer: Any = None
) -> dict[str, list[float]]:
    """Seconds of prefills from embeddings to the last token's logits, for several reductions in turn.

    Args:
        model: on one process.
        prompt: what is prefilled.
        reductions: what to drop, by name; None: nothing.
        peer: timed as "transformers" too, if given.

    Returns:
        ``rounds`` times by name.
    """
    last = prompt.layout.origin[-1:]

    def prefill(reduction: Reduction | None) -> object:
        return model.language_model(prompt.hidden, prompt.layout, prompt.dropping(model, reduction), last)

    candidates: dict[str, Callable[[], object]] = {
        name: partial(prefill, reduction) for name, reduction in reductions.items()
    }
    if peer is not None:
        embeds = prompt.hidden.transpose(0, 1)
        candidates["transformers"] = partial(peer, inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
    with measuring(model, None):
        return in_turn(candidates, rounds)


def time_pieces(
    model: VideoLanguageModel, pattern: str, sample: SampleLayout, reduction: Reduction, rounds: int = 5
) -> dict[str, float]:
    """Seconds that one layer of every kind, one score of every kind, one drop, and norm with head take on a sample.

    A layer's time is that of all layers of its kind in a row, divided by their number: as in a whole prefill, its
    weights are then not in the cache already.

    Args:
        model: on one process.
        sample: what every token is; hidden states are random.
        reduction: its scorer scores and its drop drops.
        rounds: how often each is timed; the fastest counts, for other work on the machine only adds.

    Returns:
        Seconds by name: the layer symbols, "score M" and "score *" (if the scorer asks mixers), "drop", "ends".
    """
    prompt, symbols = Prompt.of(model, sample), layer_symbols(pattern)
    hidden, layout = prompt.hidden, prompt.layout
    decoder, packing = model.language_model.decoder, pack_for_layer(layout, None, reduction.dt_filter, None)
    candidates: dict[str, Callable[[], object]] = {}
    shares: dict[str, int] = {}
    with measuring(model, None):
        for symbol in dict.fromkeys(symbols):
            layers = [layer for layer, kind in zip(decoder.layers, symbols) if kind == symbol]
            candidates[symbol], shares[symbol] = partial(_run_layers, layers, hidden, packing), len(layers)
            if KINDS[symbol].scores and reduction.scorer is not None:
                candidates[f"score {symbol}"] = _score(reduction, layers[0], hidden, layout)
        counts = tuple(round(count * _KEPT_IN_A_DROP) for count in layout.visual_counts)
        candidates["drop"] = partial(_drop, reduction, hidden, layout, counts)
        candidates["ends"] = lambda: model.language_model.output_layer(decoder.final_norm(hidden)[-1:])
        taken = in_turn(candidates, rounds)
    return {name: min(seconds) / shares.get(name, 1) for name, seconds in taken.items()}


def _run_layers(layers: list, hidden: Tensor, packing: LayerPacking) -> None:
    for layer in layers:
        layer(hidden_states=hidden, attention_mask=None, packed_seq_params=packing)


def _drop(reduction: Reduction, hidden: Tensor, layout: TokenLayout, counts: tuple[int, ...]) -> None:
    scores = torch.linspace(0, 1, len(layout.visual_index), device=hidden.device)
    _, left = ReductionPass(reduction, (layout.visual_counts, counts)).step(0, hidden, layout, scores)
    pack_for_layer(left, None, None, None)


class _Catch(Scorer):
    """A scorer that only keeps what it is given."""

    signals: Signals

    def score(self, signals: Signals, layout: TokenLayout, layer: int) -> Tensor:
        self.signals = signals
        return torch.zeros(len(layout.visual_index), device=layout.visual_index.device)


def _score(reduction: Reduction, layer: torch.nn.Module, hidden: Tensor, layout: TokenLayout) -> Callable[[], object]:
    """The score of one layer, ready to be timed on what the layer computes."""
    catch = _Catch()
    _run_layers([layer], hidden, pack_for_layer(layout, catch, reduction.dt_filter, None))
    assert reduction.scorer is not None, "a score that asks no mixer"
    return partial(reduction.scorer.score, catch.signals, layout, 0)
