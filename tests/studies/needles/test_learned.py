"""The soft drop of the study's learned weights: it sums to the budget, has its gradient, and ends as the hard one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from studies.needles.learned import WeightedScorer, gated, soft_gates, soft_loss
from tests.models.tiny import tiny_config, tiny_sample
from tests.worlds import run_world


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_gates_sum_to_what_stays(temperature: float) -> None:
    z, before = torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.rand(50)
    gates = soft_gates(z, before, 9, temperature)
    assert float(gates.sum()) == pytest.approx(9, abs=1e-3)
    assert (gates <= before).all()
    # Cold gates are the hard choice.
    cold = soft_gates(z, torch.ones(50), 9, 1e-3)
    assert set(cold.topk(9).indices.tolist()) == set(z.topk(9).indices.tolist())
    assert float(cold.topk(9).values.min()) > 0.99


def test_the_gradient_passes_through_the_threshold() -> None:
    generator = torch.Generator().manual_seed(2)
    z, before, weight = (torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(3))
    inputs = (z.requires_grad_(), before.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: (soft_gates(a, b, 3, 0.3) * weight).sum(), inputs, atol=1e-5)


def _ends_as_the_hard_drop() -> None:
    from hybridprune_megatron.analysis.damage import answer_logits, divergence
    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.evaluation.forward import measuring
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    # Attention alone drops: a key without mass is a key that is not there, where a convolution would see the gap.
    cfg = tiny_config("reduction=attention_only", pattern="M*-*M-")
    model = build_model(cfg).eval()
    model.requires_grad_(False)
    reduction, batch = model.reduction, pack([tiny_sample(0, 6)])
    logs = {
        layer: torch.zeros(4, requires_grad=True)
        for layer, (share, after) in enumerate(zip(reduction.retention, reduction.retention[1:]))
        if after < share
    }
    assert logs
    with gated(model) as gates:
        loss = soft_loss(model, batch, reduction, logs, gates, 1e-4)
    loss.backward()
    assert all(each.grad is not None for each in logs.values())
    with measuring(model, None):
        full = answer_logits(model, batch)
    with measuring(model, reduction):
        hard = answer_logits(model, batch)
    # The Mamba layer after the drops still sees gated tokens in its convolution, four of them at most.
    assert float(loss) == pytest.approx(divergence(full, hard), rel=0.2)
    equal = replace(reduction, score=WeightedScorer(weights={layer: torch.ones(4) for layer in logs}))
    with measuring(model, equal):
        torch.testing.assert_close(answer_logits(model, batch), hard)
    with measuring(model, replace(equal, score=WeightedScorer(weights={k: torch.eye(4)[0] + 1e-6 for k in logs}))):
        assert not torch.allclose(answer_logits(model, batch), hard)


def test_the_soft_drop_ends_as_the_hard_one() -> None:
    run_world(1, _ends_as_the_hard_drop)
