"""Passes of a model that record what its layers computed: scores, final states, hidden states of the question.

Nothing of the model is changed: hooks on its layers and a recorder around each Mamba layer's scan, for one pass.

Shape letters: L tokens, V visual tokens, H heads, P head width, N state size. One sample a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from hybridprune_megatron.data.batch import EncodedSample, pack
from hybridprune_megatron.evaluation.forward import device_of, measuring
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.score_agnostic import AgnosticScorer
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.settings import Select
from hybridprune_megatron.models.mamba_ops import MambaOps
from hybridprune_megatron.models.packed import LayerPacking
from hybridprune_megatron.models.video_language_model import VideoLanguageModel
from hybridprune_megatron.ops.ssd import ssd_final_states


@dataclass
class Observation:
    """What one pass recorded, by 0-based layer.

    Attributes:
        embeddings: [L, 1, hidden] that entered the first layer.
        entered: layout that entered each layer.
        scores: float32 [V], of layers that were asked to score.
        states: float32 [H * P * N], of Mamba layers: the state after the last token, where decoding would continue.
        questions: float32 [hidden], of attention layers: hidden states after the layer, mean over the query tokens.
    """

    embeddings: Tensor | None = None
    entered: list[TokenLayout] = field(default_factory=list)
    scores: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    questions: dict[int, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> TokenLayout:
        """The layout that entered the first layer."""
        return self.entered[0]


def observe(model: VideoLanguageModel, prompt: EncodedSample, reduction: Reduction | None) -> Observation:
    """A pass from pixels under a reduction; only ``entered`` is filled."""
    seen = Observation()
    with measuring(model, reduction):
        _run(model, prompt, seen.entered)
    return seen


def observe_full(model: VideoLanguageModel, prompt: EncodedSample, scorer: Scorer | None) -> Observation:
    """A pass from pixels that drops nothing; every layer that can score does, if there is a scorer."""
    with measuring(model, None), _recording(model, scorer) as seen:
        _run(model, prompt, seen.entered)
    return seen


def observe_embedded(
    model: VideoLanguageModel, embeddings: Tensor, layout: TokenLayout, reduction: Reduction | None
) -> Observation:
    """A pass from embeddings that an earlier pass recorded, so that the vision tower runs once.

    Args:
        model: on one device.
        embeddings: [L, 1, hidden].
        layout: of the embeddings.
        reduction: what the layers drop.
    """
    with measuring(model, reduction), _recording(model, None) as seen:
        decoder = model.language_model.decoder
        decoder(embeddings, layout, decoder.pass_of(reduction, layout), seen.entered)
    return seen


@dataclass(frozen=True, eq=False)
class ChosenTokens(AgnosticScorer):
    """A scorer that ranks given tokens last: with a retention to match, exactly these are dropped.

    Attributes:
        dropped: bool [L] over the packed sequence before any reduction.
    """

    name: ClassVar[str] = "chosen"
    dropped: Tensor

    def draw(self, layout: TokenLayout, layer: int) -> Tensor:
        return (~self.dropped[layout.origin[layout.visual_index]]).float()


def drop_after(layer: int, dropped: Tensor, layout: TokenLayout, num_layers: int) -> Reduction:
    """A reduction that drops given visual tokens of a single sample right after a layer, and nothing else.

    Args:
        layer: 0-based, one that can score, not the last.
        dropped: bool [L]; visual tokens only.
        layout: of the sample, unreduced.
    """
    assert len(layout.visual_counts) == 1, layout.visual_counts
    visual = layout.visual_counts[0]
    left = (visual - int(dropped.sum())) / visual
    retention = (1.0,) * (layer + 1) + (left,) * (num_layers - layer - 1)
    how = Select()
    # Where everything is dropped nothing may be left over; a configuration could not say that.
    how.min_tokens = 0
    return Reduction(ChosenTokens(dropped), retention, how)


def _run(model: VideoLanguageModel, prompt: EncodedSample, trace: list[TokenLayout]) -> None:
    last = torch.tensor([prompt.layout.num_tokens - 1], device=device_of(model))
    model.logits(pack([prompt]).to(device_of(model)), last, trace)


@contextmanager
def _recording(model: VideoLanguageModel, scorer: Scorer | None) -> Iterator[Observation]:
    """Hooks for one pass; ``scorer`` is given to every layer that can score."""
    seen = Observation()
    decoder = model.language_model.decoder

    def before_stack(stack: nn.Module, arguments: tuple[Any, ...]) -> None:
        del stack
        seen.embeddings = arguments[0]

    def before_layer(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        del layer, arguments
        packing: LayerPacking = options["packed_seq_params"]
        # An MLP layer never looks at it.
        packing.scorer = scorer

    def after_layer(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        del arguments
        packing: LayerPacking = options["packed_seq_params"]
        index = layer.layer_number - 1
        if packing.scores is not None:
            seen.scores[index] = packing.scores
        # An MLP layer has an identity in its place.
        if isinstance(getattr(layer, "self_attention", None), SelfAttention):
            hidden = output[0] if isinstance(output, tuple) else output
            seen.questions[index] = hidden.squeeze(1)[packing.layout.query_index].float().mean(0)

    with ExitStack() as undo:
        undo.enter_context(decoder.register_forward_pre_hook(before_stack))
        for layer in decoder.layers:
            if scorer is not None:
                undo.enter_context(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            undo.enter_context(layer.register_forward_hook(after_layer, with_kwargs=True))
            mixer = getattr(layer, "mixer", None)
            if mixer is not None:
                undo.callback(setattr, mixer, "ops", mixer.ops)
                mixer.ops = _StateRecorder(mixer.ops, seen.states, layer.layer_number - 1)
        yield seen


class _StateRecorder:
    """The scan of one Mamba layer that also keeps the state after the last token."""

    def __init__(self, ops: MambaOps, states: dict[int, Tensor], layer: int) -> None:
        self.ops, self.states, self.layer = ops, states, layer

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, packing: LayerPacking) -> Tensor:
        return self.ops.conv(x, weight, bias, packing)

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, packing: LayerPacking, chunk_size: int
    ) -> Tensor:
        state = ssd_final_states(x, dt, A, B, packing.layout.cu_seqlens, packing.sample_index)
        self.states[self.layer] = state.flatten()
        return self.ops.scan(x, dt, A, B, C, D, packing, chunk_size)
