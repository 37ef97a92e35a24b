"""Validation of one model under any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.held_out import FewSamples
from tests.models.tiny import tiny_sample
from tests.parallel.run import MULTIPLE_OF, PATTERN, built, config_of, own_device

#: Frames of the held-out samples, two of which make a packed sequence: five of them, and one that cannot be decoded.
FRAMES = (17, 25, 9, 12, 40, 15, 0, 23, 8, 31, 5)
UNANSWERED, BROKEN = (1,), (2, 3, 10)


def held_out(answers: dict[int, list[int]], multiple_of: int = MULTIPLE_OF) -> FewSamples:
    """The samples; some of them with other answers than random ones."""
    samples = [tiny_sample(index, frames) for index, frames in enumerate(FRAMES)]
    for index, tokens in answers.items():
        labels = samples[index].labels.clone()
        labels[-3:-1] = labels.new_tensor(tokens)
        samples[index] = replace(samples[index], labels=labels)
    return FewSamples(samples, 2, multiple_of, UNANSWERED, BROKEN)


def _state(weights: str, sizes: dict[str, int], overrides: list[str], pattern: str) -> tuple[Any, Any]:
    """Configuration and model in training."""
    from hybridprune_megatron.engine.optimization import build_train_state

    cfg = config_of(sizes, overrides, pattern)
    return cfg, build_train_state(built(cfg, weights), cfg.optim, cfg.trainer, cfg.parallel, own_device())


def figures(
    weights: str,
    sizes: dict[str, int],
    overrides: list[str],
    answers: dict[int, list[int]],
    pattern: str = PATTERN,
    multiple_of: int = MULTIPLE_OF,
) -> dict[str, float]:
    """What a validation finds; it must leave no trace."""
    import torch

    from hybridprune_megatron.engine.rng_state import rng_state
    from hybridprune_megatron.engine.validation import Validator

    cfg, state = _state(weights, sizes, overrides, pattern)
    for chunk in state.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    generators = repr(rng_state())
    before = {name: value.clone() for name, value in state.module.state_dict().items() if torch.is_tensor(value)}
    found = Validator(held_out(answers, multiple_of), cfg.data.sequence_length, cfg.drops).measure(state)
    assert repr(rng_state()) == generators
    for name, value in state.module.state_dict().items():
        assert not torch.is_tensor(value) or torch.equal(value, before[name]), name
    assert all(chunk.training for chunk in state.ddp)
    assert all(not parameter.main_grad.any() for parameter in state.module.parameters() if parameter.requires_grad)
    assert all(model.reduction is not None for model in state.module.modules() if hasattr(model, "train_vision"))
    return found


def likeliest(weights: str, overrides: list[str], pattern: str = PATTERN) -> dict[int, list[int]]:
    """What the model answers to every second sample with the tokens dropped, in one process."""
    import torch

    from hybridprune_megatron.data.batch import IGNORE_LABEL

    _, state = _state(weights, {}, overrides, pattern)
    samples, model, found = held_out({}), state.module.eval(), {}
    for planned in samples.plan():
        batch, present = samples.read(planned)
        if batch is None:
            continue
        batch = batch.to(own_device())
        with torch.no_grad():
            best = model.logits(batch, torch.nonzero(batch.labels != IGNORE_LABEL).flatten())[0].argmax(-1).tolist()
        for each, there in zip(planned, present):
            if there:
                found[each.number] = [best.pop(0), best.pop(0)]
    return {number: tokens for number, tokens in found.items() if number % 2 == 0}


def several(weights: str, settings: list[list[str]], answers: dict[int, list[int]]) -> list[dict[str, float]]:
    """``figures`` in one process under several settings."""
    return [figures(weights, {}, overrides, answers) for overrides in settings]


def both_ways(weights: str, answers: dict[int, list[int]]) -> tuple[dict[str, float], list[float]]:
    """A validation, and the accuracies that ``hybridprune evaluate`` finds on the same samples."""
    from hybridprune_megatron.evaluation.accuracy import evaluate
    from hybridprune_megatron.evaluation.held_out import Question

    # Without alignment it does not matter what a sample is packed with.
    alone = ["reduction.select.multiple_of=1"]
    found = figures(weights, {}, alone, answers, multiple_of=1)
    _, state = _state(weights, {}, alone, PATTERN)
    known = [number for number in range(len(FRAMES)) if number not in (*UNANSWERED, *BROKEN)]
    samples = held_out(answers, 1)
    questions = [Question(samples.samples[number], "a", "x", ("x",)) for number in known]
    return found, [evaluate(state.module, questions, each, 200).accuracy for each in (state.module.reduction, None)]
