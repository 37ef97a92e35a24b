"""Distillation: the divergence against its formula, and what the teacher sees, on one process and on two."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world

_WEIGHT, _TEMPERATURE = 0.3, 1.7
_SETTINGS = (f"tuning.distillation.weight={_WEIGHT}", f"tuning.distillation.temperature={_TEMPERATURE}")


def _formula(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) a row, in float64."""
    log_p, log_q = ((logits.double() / temperature).log_softmax(-1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).float()


def _divergence_on(ranks: int) -> None:
    from megatron.core import parallel_state

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.distillation import vocab_parallel_kl

    init_model_parallel(tensor=ranks, seed=1)
    rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(3)
    # Logits far from 0 and, in one row, all but one far below: sums must not overflow.
    student = (torch.randn(7, 26, generator=generator) * 5 + 90).requires_grad_()
    teacher = torch.randn(7, 26, generator=generator) * 5 - 200
    teacher[2, 3] += 150
    upstream = torch.rand(7, generator=generator)
    mine = student.detach().chunk(ranks, -1)[rank].clone().requires_grad_()
    found = vocab_parallel_kl(mine, teacher.chunk(ranks, -1)[rank], _TEMPERATURE, group)
    expected = _formula(student, teacher, _TEMPERATURE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(mine.grad, student.grad.chunk(ranks, -1)[rank], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_divergence_and_its_gradient_are_the_formula(ranks):
    run_world(ranks, _divergence_on, ranks)


def _build(teacher: str, *overrides: str, tensor: int = 1):
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(tensor=tensor, seed=1)
    settings = (*_SETTINGS, f"tuning.distillation.teacher={teacher}", "model.init_checkpoint=base.safetensors")
    return build_model(tiny_config(*settings, *overrides)).train()


def _plain_loss(model, batch, teacher_logits):
    """The loss of a batch, written out; ``teacher_logits`` [R, vocabulary]."""
    rows = torch.nonzero(batch.loss_mask).flatten()
    student, _ = model.logits(batch, rows)
    entropy = torch.nn.functional.cross_entropy(student, batch.labels[rows], reduction="none")
    divergence = _formula(student, teacher_logits, _TEMPERATURE)
    return (1 - _WEIGHT) * entropy + _WEIGHT * _TEMPERATURE**2 * divergence


def _full_logits(model, batch):
    reduction, model.reduction = model.reduction, None
    with torch.no_grad():
        logits, _ = model.logits(batch, torch.nonzero(batch.loss_mask).flatten())
    model.reduction = reduction
    return logits


def _loss_and_gradient(model, batch):
    """Losses and gradients of the model and of the formula."""
    batch = replace(batch, retention=(model.reduction.retention,) * 2)
    model.reduction = replace(model.reduction, retention=(1.0,) * 6)
    for loss in (model(batch), _plain_loss(model, batch, _full_logits(model, replace(batch, retention=None)))):
        model.zero_grad()
        loss.sum().backward()
        yield loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _self_teacher() -> None:
    model = _build("self")
    (found, gradients), (expected, formula) = _loss_and_gradient(model, tiny_batch(3, 5))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == formula.keys()
    for name, gradient in formula.items():
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=message)
    # Training goes on as it was: the look at the teacher leaves no trace.
    assert model.training
    assert model.reduction is not None
    entropy = model.eval()(tiny_batch(3, 5)).detach()
    assert entropy.shape == found.shape
    assert not torch.allclose(entropy, found)


def test_loss_with_todays_weights_as_teacher_is_the_formula():
    run_world(1, _self_teacher)


def _initial_teacher() -> None:
    model = _build("initial")
    batch = tiny_batch(3, 5)
    model.keep_initial_weights()
    teacher = _full_logits(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    found = model(batch).detach()
    torch.testing.assert_close(found, _plain_loss(model, batch, teacher).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, _plain_loss(model, batch, _full_logits(model, batch)).detach(), rtol=1e-3)


def test_loss_with_the_initial_weights_as_teacher_is_the_formula():
    run_world(1, _initial_teacher)


def _train(weights: str, tensor: int, sequence_parallel: bool, recompute: str) -> list[float]:
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config(
        *_SETTINGS,
        f"model.init_checkpoint={weights}",
        *(f"parallel.tensor={tensor}", f"trainer.devices={tensor}", f"parallel.sequence_parallel={sequence_parallel}"),
        *(
            "optim.lr=0.01",
            "trainer.global_batch_size=2",
            "reduction.select.multiple_of=2",
            f"trainer.recompute={recompute}",
        ),
    )
    init_model_parallel(tensor=tensor, seed=1)
    model = build_model(cfg)
    load_initial_weights(model, weights)
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    model.keep_initial_weights()
    batches = [tiny_batch(3, 5, pad_to_multiple_of=2), tiny_batch(4, 2, 1, pad_to_multiple_of=2)]
    return [train_step(state, iter(batches), 2, 64, step).loss for step in range(1, 5)]


def _write_weights(path: str) -> None:
    from hybridprune_megatron.engine.weights import save_weights

    save_weights(_build("self"), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_world(1, _write_weights, path)
    return path


@pytest.fixture(scope="module")
def alone(weights) -> list[float]:
    return run_world(1, _train, weights, 1, False, "none")[0]


@pytest.mark.parametrize(("sequence_parallel", "recompute"), [(False, "none"), (True, "full")])
def test_two_ranks_distill_as_one_process(weights, alone, sequence_parallel, recompute):
    assert alone[-1] < alone[0]
    for losses in run_world(2, _train, weights, 2, sequence_parallel, recompute):
        assert losses == pytest.approx(alone, rel=2e-5)
