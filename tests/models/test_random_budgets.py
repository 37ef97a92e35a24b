"""Samples of one packed sequence at budgets of their own."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.models.tiny import tiny_config, tiny_sample
from tests.worlds import run_world

_BUDGETS = (0.4, 1.0, 0.7)


def _build():
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    # A budget of 1 for evaluation, so that all that is dropped is dropped by the batch's own retention.
    cfg = tiny_config("tuning=random_budget", "tuning.budget.low=0.4", budget=1.0)
    return cfg, build_model(cfg).train()


def _loss_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch)
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def _packed_and_alone() -> None:
    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.method.reduction import Reduction

    cfg, model = _build()
    samples = [tiny_sample(index, frames) for index, frames in enumerate((5, 3, 4))]
    score = model.reduction.score
    retention = tuple(cfg.retention_at(budget) for budget in _BUDGETS)
    losses, gradients = _loss_and_gradients(model, replace(pack(samples), retention=retention))
    alone = []
    for sample, budget in zip(samples, _BUDGETS):
        model.reduction = Reduction(score, cfg.retention_at(budget))
        alone.append(_loss_and_gradients(model, pack([sample])))
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        total = sum(grads[name] for _, grads in alone)
        torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    # In another order the same retentions give other losses: each sample has got its own.
    swapped = model(replace(pack(samples), retention=retention[::-1])).detach()
    assert not torch.allclose(losses, swapped)


def test_packed_samples_keep_their_own_budgets():
    run_world(1, _packed_and_alone)


def _nothing_dropped() -> None:
    from hybridprune_megatron.data.batch import pack

    cfg, model = _build()
    batch = pack([tiny_sample(0, 5), tiny_sample(1, 3)])
    ones = replace(batch, retention=(cfg.retention_at(1.0),) * 2)
    drawn, drawn_gradients = _loss_and_gradients(model, ones)
    model.reduction = None
    full, full_gradients = _loss_and_gradients(model, batch)
    assert torch.equal(drawn, full)
    assert all(torch.equal(full_gradients[name], drawn_gradients[name]) for name in full_gradients)


def test_a_drawn_budget_of_one_is_bitwise_the_model_without_reduction():
    run_world(1, _nothing_dropped)
