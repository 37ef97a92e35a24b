"""What a pass leaves behind, against what layers are really asked for, and forced drops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.scorer import Scorer
from tests.models.tiny import PATTERN, tiny_config, tiny_sample
from tests.worlds import run_world

SCORING = [layer for layer, symbol in enumerate(PATTERN) if symbol in "M*"]


@dataclass(frozen=True)
class SpyScorer(Scorer):
    """Scores as another and keeps what it gave, by layer."""

    name: ClassVar[str] = "spy"
    scorer: Scorer
    seen: dict[int, Tensor] = field(default_factory=dict)

    def score(self, signals, layout, layer):
        self.seen[layer] = self.scorer.score(signals, layout, layer)
        return self.seen[layer]


class InputRecorder:
    """A scan that keeps what it was given."""

    def __init__(self, ops) -> None:
        self.ops, self.inputs = ops, {}

    def conv(self, *arguments):
        return self.ops.conv(*arguments)

    def scan(self, x, dt, A, B, C, D, packing, chunk_size):
        self.inputs = {"x": x, "dt": dt, "A": A, "B": B}
        return self.ops.scan(x, dt, A, B, C, D, packing, chunk_size)


def _model():
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    return build_model(tiny_config()).eval()


def _prompt() -> EncodedSample:
    from hybridprune_megatron.analysis.samples import cut_answer

    return cut_answer(tiny_sample(1, frames=5))


def _retention(layer: int, left: float) -> tuple[float, ...]:
    return (1.0,) * (layer + 1) + (left,) * (len(PATTERN) - layer - 1)


def _final_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T`` token by token; head h reads group h * G // H."""
    heads, groups = x.shape[1], B.shape[1]
    state = torch.zeros(heads, x.shape[2], B.shape[2], dtype=torch.float64)
    for token in range(len(x)):
        for head in range(heads):
            written = dt[token, head] * torch.outer(x[token, head], B[token, head * groups // heads])
            state[head] = state[head] * torch.exp((dt[token, head] * A[head]).double()) + written
    return state.float()


def _observe() -> None:
    from hybridprune_megatron.analysis.observe import observe_embedded, observe_full

    model, prompt = _model(), _prompt()
    layers = model.language_model.decoder.layers
    mixers = {layer: layers[layer].mixer for layer in SCORING if PATTERN[layer] == "M"}
    own = {layer: mixer.ops for layer, mixer in mixers.items()}
    recorders = {layer: InputRecorder(ops) for layer, ops in own.items()}
    for layer, mixer in mixers.items():
        mixer.ops = recorders[layer]
    scorer = model.reduction.scorer
    full = observe_full(model, prompt, scorer)
    assert sorted(full.scores) == SCORING
    assert len(full.entered) == len(PATTERN)
    assert all(layout.visual_counts == (20,) for layout in full.entered)
    for layer, recorder in recorders.items():
        expected = _final_state(**recorder.inputs)
        torch.testing.assert_close(full.states[layer], expected.flatten(), rtol=1e-4, atol=1e-6)
    # Nothing of a pass stays in the model.
    assert all(mixer.ops is recorders[layer] for layer, mixer in mixers.items())
    for module in (model.language_model.decoder, *layers):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks

    assert sorted(full.questions) == [3]
    for layer in SCORING[:-1]:
        # A real reduction asks one layer only; it sees every token, so it must score as in the full pass.
        spy = SpyScorer(scorer)
        observe_embedded(model, full.embeddings, full.layout, Reduction(spy, _retention(layer, 0.5)))
        assert list(spy.seen) == [layer]
        assert torch.equal(spy.seen[layer], full.scores[layer])
    inputs: dict[int, Tensor] = {}
    handle = layers[4].register_forward_pre_hook(
        lambda layer, arguments, options: inputs.update({4: options["hidden_states"]}), with_kwargs=True
    )
    again = observe_embedded(model, full.embeddings, full.layout, None)
    handle.remove()
    assert not again.scores
    assert all(torch.equal(again.states[layer], state) for layer, state in full.states.items())
    # What left the attention layer is what entered the one behind it.
    question = inputs[4].squeeze(1)[full.layout.query_index].mean(0)
    torch.testing.assert_close(full.questions[3], question, rtol=1e-5, atol=1e-6)


def test_a_pass_leaves_scores_states_and_hidden_states_and_no_trace():
    run_world(1, _observe)


def _visual_positions(layout: TokenLayout) -> list[int]:
    return layout.position[layout.visual_index].tolist()


def _drops() -> None:
    from hybridprune_megatron.analysis.observe import drop_after, observe, observe_embedded, observe_full

    model, prompt = _model(), _prompt()
    full = observe_full(model, prompt, None)
    visual = full.layout.visual_index.tolist()
    chosen = [visual[index] for index in (0, 4, 5, 6, 7, 13, 19)]
    dropped = torch.zeros(full.layout.num_tokens, dtype=torch.bool)
    dropped[chosen] = True
    for layer in SCORING[:-1]:
        seen = observe_embedded(
            model, full.embeddings, full.layout, drop_after(layer, dropped, full.layout, len(PATTERN))
        )
        for depth, layout in enumerate(seen.entered):
            left = visual if depth <= layer else [position for position in visual if position not in chosen]
            assert _visual_positions(layout) == left, (layer, depth)
        before = {**full.states, **full.questions}
        for depth, values in {**seen.states, **seen.questions}.items():
            # Up to the drop nothing has changed, to the bit; every layer behind it has.
            assert torch.equal(values, before[depth]) == (depth <= layer), (layer, depth)
    # From pixels, under the model's own reduction: the counts it asks for.
    reduced = observe(model, prompt, model.reduction)
    wanted = model.language_model.decoder.pass_of(model.reduction, full.layout).counts
    assert tuple(layout.visual_counts for layout in reduced.entered) == wanted
    assert reduced.entered[-1].visual_counts[0] < 20


def test_forced_drops_take_these_tokens_and_change_deeper_layers_only():
    run_world(1, _drops)
