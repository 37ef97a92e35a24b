"""Accuracy, measured retention and timing against what a small model does when asked step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridprune_megatron.data.batch import EncodedSample, pack
from hybridprune_megatron.evaluation.accuracy import Retention, sample_retention
from hybridprune_megatron.evaluation.held_out import Question, chance
from hybridprune_megatron.method.counts import kept_counts
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from tests.models.tiny import tiny_batch, tiny_config, tiny_sample
from tests.worlds import run_world

ANSWER_LENGTH = 2


def _model(*overrides: str, tensor: int = 1):
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(tensor=tensor, seed=1)
    return build_model(tiny_config(*overrides)).train()


def _greedy_sample(model, index: int, frames: int) -> EncodedSample:
    """A sample whose answer is what the model, under its own reduction, writes token by token."""
    sample = tiny_sample(index, frames)
    prompt = sample.layout.spans[:-1]
    ids = sample.input_ids[:-ANSWER_LENGTH]
    for written in range(ANSWER_LENGTH):
        spans = (*prompt, Span(TokenKind.ANSWER, written)) if written else prompt
        grown = EncodedSample("", ids, torch.full_like(ids, -100), SampleLayout(spans), sample.pixel_values)
        with torch.no_grad():
            logits, _ = model.logits(pack([grown]), torch.tensor([len(ids) - 1]))
        ids = torch.cat([ids, logits[0].argmax()[None]])
    labels = torch.full_like(ids, -100)
    labels[-1 - ANSWER_LENGTH : -1] = ids[-ANSWER_LENGTH:]
    return replace(sample, input_ids=ids, labels=labels)


def _wrong_from(sample: EncodedSample, token: int) -> EncodedSample:
    """The same sample with another token in its answer."""
    ids, labels = sample.input_ids.clone(), sample.labels.clone()
    ids[-ANSWER_LENGTH + token] = labels[-1 - ANSWER_LENGTH + token] = (ids[-ANSWER_LENGTH + token] + 1) % 64
    return replace(sample, key=f"{sample.key}-wrong-{token}", input_ids=ids, labels=labels)


def _accuracy() -> None:
    from hybridprune_megatron.evaluation.accuracy import evaluate

    model = _model()
    right = [_greedy_sample(model, index, frames) for index, frames in enumerate((3, 5, 2))]
    questions = [Question(sample, "a", "x", ("x", "y")) for sample in right]
    questions += [Question(_wrong_from(right[0], 0), "b", "x", ("x", "y", "z", "w"))]
    questions += [Question(_wrong_from(right[1], 1), "b", "x", ("x", "y", "z", "w"))]
    assert chance(questions) == pytest.approx((3 / 2 + 2 / 4) / 5)
    reduction = model.reduction
    for max_tokens in (1, 60, 1000):
        result = evaluate(model, questions, reduction, max_tokens)
        assert result.by_kind == {"a": 1.0, "b": 0.0}, max_tokens
        assert result.accuracy == pytest.approx(3 / 5)
        assert result.num_samples == 5
        counts = [kept_counts(reduction.retention, 4 * frames) for frames in (3, 5, 2, 3, 5)]
        shares = [[count / sample[0] for count in sample] for sample in counts]
        assert result.retention.by_layer == pytest.approx([sum(layer) / 5 for layer in zip(*shares)])
        assert result.retention.mean == pytest.approx(0.5, abs=0.02)
    full = evaluate(model, questions, None, 60)
    assert full.retention.by_layer == (1.0,) * 6
    assert full.retention.mean == 1.0
    # Put back, whatever was measured.
    assert model.reduction is reduction
    assert model.training
    with pytest.raises(ValueError, match="keys must differ"):
        evaluate(model, [questions[0], questions[0]], None, 60)
    with pytest.raises(ValueError, match="0 held-out samples"):
        evaluate(model, [], None, 60)


def test_accuracy_is_that_of_greedy_decoding_under_any_packing():
    run_world(1, _accuracy)


def _two_ranks() -> dict[str, bool]:
    from hybridprune_megatron.evaluation.accuracy import evaluate

    model = _model("trainer.devices=2", "parallel.tensor=2", "parallel.sequence_parallel=true", tensor=2)
    samples = [tiny_sample(index, frames) for index, frames in enumerate((3, 5, 2))]
    # Labels that the last rank's half of the vocabulary holds too: the best token must be found over both halves.
    with torch.no_grad():
        batch = pack(samples, 2)
        from hybridprune_megatron.evaluation.forward import measuring

        with measuring(model, None):
            rows = torch.nonzero(batch.loss_mask).flatten()
            local, _ = model.logits(batch, rows)
    parts = [torch.empty_like(local) for _ in range(2)]
    torch.distributed.all_gather(parts, local)
    best = torch.cat(parts, -1).argmax(-1)
    assert (best >= 32).any(), "the test needs answers in the second rank's half"
    samples = [
        replace(sample, labels=sample.labels.masked_scatter(sample.labels != -100, best[2 * index : 2 * index + 2]))
        for index, sample in enumerate(samples)
    ]
    questions = [Question(sample, "a", "x", ("x",)) for sample in samples]
    return evaluate(model, questions, None, 1000).correct


def test_accuracy_looks_at_the_whole_vocabulary_of_two_tensor_parallel_ranks():
    first, second = run_world(2, _two_ranks)
    assert first == second
    assert len(first) == 3
    assert all(first.values())


def _timing() -> None:
    from studies.demo.prefill import time_prefill

    model = _model()
    batch = tiny_batch(3, 5, 2)
    calls: list[object] = []
    original = model.logits

    def counted(batch, rows):
        calls.append((model.reduction, model.training, torch.is_grad_enabled(), rows.tolist()))
        return original(batch, rows)

    model.logits = counted
    timing = time_prefill(model, batch, {"full": None, "reduced": model.reduction}, rounds=3)
    ends = torch.tensor([layout.num_tokens for layout in batch.layouts]).cumsum(0).sub(1).tolist()
    assert calls == [(None, False, False, ends), (model.reduction, False, False, ends)] * 4
    assert set(timing.seconds) == {"full", "reduced", "vision"}
    assert all(low <= timing.seconds[name] <= high for name, (low, high) in timing.spread.items())
    assert (timing.rounds, timing.num_samples, timing.num_tokens) == (3, 3, len(batch.input_ids))


def test_prefill_is_timed_in_turn_and_without_gradients():
    run_world(1, _timing)


def test_measured_retention_leaves_samples_without_video_out():
    text = SampleLayout((Span(TokenKind.TEXT, 4),))
    video = SampleLayout((Span(TokenKind.FRAME, 8, 0, 0), Span(TokenKind.QUESTION, 2)))
    first = TokenLayout.from_samples([text, video])
    second = replace(first, visual_counts=(0, 2))
    assert sample_retention([first, second]) == [(1.0, 0.25)]
    # Something before the model has dropped tokens before layer 0.
    assert sample_retention([second, second]) == [(0.25, 0.25)]
    assert Retention.of([(1.0, 0.25), (1.0, 0.75)]) == Retention((1.0, 0.5), 0.75)


def test_a_question_knows_its_answer():
    with pytest.raises(ValueError, match="answer 'seven' is none of red, blue"):
        Question(tiny_sample(0), "colour", "seven", ("red", "blue"))
