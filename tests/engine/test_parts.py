"""Parts of the model: learning rates of their own, and frozen ones that nothing touches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world

_LR = 0.01
_SCALES = {"vision": 0.1, "projector": 2.0, "language": 0.5}
_PREFIXES = {"vision": "vision_model.", "projector": "mlp1.", "language": "language_model."}


def _part_of(name: str) -> str:
    return next(part for part, prefix in _PREFIXES.items() if name.startswith(prefix))


def _state(*overrides: str) -> Any:
    import torch

    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config(f"optim.lr={_LR}", "trainer.global_batch_size=1", "trainer.max_steps=8", *overrides)
    init_model_parallel(seed=1)
    return build_train_state(build_model(cfg), cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))


def _scaled(precision: str) -> None:
    from hybridprune_megatron.engine.train_step import train_step

    scales = [f"optim.lr_scale.{part}={factor}" for part, factor in _SCALES.items()]
    settings = ("model.trainable.vision=true", "optim.warmup_steps=3", "optim.min_lr=0.001", "optim.clip_grad=0")
    state = _state(*settings, *scales, f"trainer.precision={precision}")
    before = {name: p.detach().float().clone() for name, p in state.module.named_parameters()}
    result = train_step(state, iter([tiny_batch(3, 5)]), 1, 64, 1)
    # Warmup starts at a third of the peak.
    assert result.lr == pytest.approx(_LR / 3)
    largest: dict[str, float] = {}
    for name, parameter in state.module.named_parameters():
        change = (parameter.detach().float() - before[name]).abs().max().item()
        largest[_part_of(name)] = max(largest.get(_part_of(name), 0.0), change)
    # Adam's first update is the learning rate itself wherever the gradient is well above epsilon.
    expected = {part: factor * _LR / 3 for part, factor in _SCALES.items()}
    if precision == "fp32":
        assert largest == pytest.approx(expected, rel=2e-3)
    # Weights in bf16 are rounded behind the update; there the sizes of the groups say who learns at which rate.
    sizes = dict.fromkeys(_SCALES.values(), 0)
    for group in state.optimizer.param_groups:
        sizes[group["lr_mult"]] += sum(p.numel() for p in group["params"])
    for part, factor in _SCALES.items():
        assert sizes[factor] == sum(p.numel() for name, p in before.items() if _part_of(name) == part)
    # At every later step of warmup and decay the groups stay in proportion.
    for _ in range(7):
        rates = {group["lr_mult"]: group["lr"] for group in state.optimizer.param_groups}
        assert rates.keys() == set(_SCALES.values())
        assert [rate / factor for factor, rate in rates.items()] == pytest.approx([max(rates.values()) / 2.0] * 3)
        state.scheduler.step(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_part_learns_at_its_own_rate(precision: str) -> None:
    run_world(1, _scaled, precision)


def _frozen(learning: str, precision: str) -> None:
    import torch

    from hybridprune_megatron.engine.train_step import train_step

    switches = [f"model.trainable.{part}={str(part == learning).lower()}" for part in _PREFIXES]
    state = _state(*switches, "optim.warmup_steps=0", "optim.weight_decay=0.1", f"trainer.precision={precision}")
    parameters = dict(state.module.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step in (1, 2, 3):
        train_step(state, iter([tiny_batch(3, 5)]), 1, 64, step)
    changed = {_part_of(name) for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert changed == {learning}
    # Nor do frozen parts take memory for gradients and moments.
    learned = {name for name in parameters if _part_of(name) == learning}
    buffered = {id(p) for buffer in state.ddp[0].buffers for p in buffer.params}
    assert buffered == {id(parameters[name]) for name in learned}
    size = sum(parameters[name].numel() for name in learned)
    assert sum(p.numel() for group in state.optimizer.param_groups for p in group["params"]) == size


@pytest.mark.parametrize(("learning", "precision"), [("vision", "fp32"), ("projector", "bf16"), ("language", "fp32")])
def test_frozen_parts_stay_as_they_are_bit_for_bit(learning: str, precision: str) -> None:
    run_world(1, _frozen, learning, precision)
