"""Budgets drawn at random: the same whatever the packing, the rank or a resume."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import PackedBatch, pack
from hybridprune_megatron.engine.module import BudgetSampler
from tests.engine.job import run_job
from tests.models.tiny import tiny_config, tiny_sample
from tests.worlds import run_world

_RANDOM = ("tuning=random_budget", "tuning.budget.low=0.4")


def _keyed(*keys: str) -> PackedBatch:
    return pack([replace(tiny_sample(index), key=key) for index, key in enumerate(keys)])


def _drawn(sampler: BudgetSampler, batch: PackedBatch, step: int) -> dict[str, float]:
    """Mean retention of every sample, which is its budget."""
    assigned = sampler.assign(batch, step)
    assert assigned.retention is not None
    return {key: sum(shares) / len(shares) for key, shares in zip(batch.keys, assigned.retention, strict=True)}


def test_a_sample_draws_alike_in_any_packing() -> None:
    keys = [f"clip-{number}" for number in range(40)]
    sampler = BudgetSampler(tiny_config(*_RANDOM))
    together = _drawn(sampler, _keyed(*keys), 5)
    assert len(set(together.values())) > 20
    # Two replicas with half of the samples each, in another order and in another process' sampler.
    other = BudgetSampler(tiny_config(*_RANDOM))
    apart = _drawn(other, _keyed(*keys[::-2]), 5) | _drawn(other, _keyed(*keys[-2::-2]), 5)
    assert apart == together
    assert _drawn(sampler, _keyed(*keys), 6) != together
    assert _drawn(BudgetSampler(tiny_config(*_RANDOM, "trainer.seed=4")), _keyed(*keys), 5) != together


def test_every_draw_has_the_schedule_of_its_budget() -> None:
    choices = [0.4, 0.7, 1.0]
    cfg = tiny_config("tuning.budget.distribution=choice", f"tuning.budget.choices={choices}")
    drawn = _drawn(BudgetSampler(cfg), _keyed(*map(str, range(40))), 1)
    assert {round(budget, 6) for budget in drawn.values()} == set(choices)
    batch = BudgetSampler(cfg).assign(_keyed(*map(str, range(40))), 1)
    assert set(batch.retention or ()) == {tiny_config(budget=budget).retention_by_layer for budget in choices}


def test_one_draw_a_step_is_shared() -> None:
    sampler = BudgetSampler(tiny_config(*_RANDOM, "tuning.budget.per=step"))
    steps = [set(_drawn(sampler, _keyed("a", "b", "c"), step).values()) for step in range(1, 30)]
    assert all(len(budgets) == 1 for budgets in steps)
    assert len(set(itertools.chain(*steps))) > 10


def _write_weights(path: str) -> None:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import save_weights
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=2)
    save_weights(build_model(tiny_config()), path)


def _job(folder: Path, *overrides: str) -> Config:
    """All that finetuning can do, at once."""
    weights = folder.parent / "weights.safetensors"
    settings = [
        *("trainer.max_steps=5", "trainer.save_every_n_steps=2", "optim.lr=0.01", "optim.warmup_steps=1"),
        *("tuning=lora", "tuning.lora.rank=2", "tuning.lora.dropout=0.1", "optim.lr_scale.language=2"),
        *("tuning.distillation.weight=0.5", f"model.init_checkpoint={weights}"),
        *("tuning.budget.distribution=uniform", "tuning.budget.low=0.4"),
    ]
    return tiny_config(f"output_dir={folder}", *settings, *overrides)


def _digits(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(repr(row["loss"]), repr(row["grad_norm"]), repr(row["lr"])) for row in rows]


def test_resumed_run_draws_as_one_that_was_left_alone(tmp_path: Path) -> None:
    run_world(1, _write_weights, str(tmp_path / "weights.safetensors"))
    whole = _digits(run_world(1, run_job, _job(tmp_path / "whole"), 0.0, "", False, True)[0])
    killed = _job(tmp_path / "killed")
    with pytest.raises(AssertionError, match="died without an error message"):
        run_world(1, run_job, killed, 0.0, "step:4", False, True)
    assert _digits(run_world(1, run_job, killed, 0.0, "", False, True)[0]) == whole
    # The draws decide about the digits, or the lines above would say nothing about them.
    other = _job(tmp_path / "other", "tuning.budget.low=0.41", "trainer.max_steps=2")
    assert _digits(run_world(1, run_job, other, 0.0, "", False, True)[0])[0] != whole[0]
