"""Gives the samples of a training step budgets of their own (``tuning.budget``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hybridprune_megatron.method.budgets import budget_levels, draw_budget

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.data.batch import PackedBatch


class BudgetSampler:
    """Draws a budget for every sample and looks its schedule up; holds no state but solved schedules.

    Args:
        cfg: uses ``tuning.budget``, ``trainer.seed``, and what the schedules are solved from.
    """

    def __init__(self, cfg: Config) -> None:
        budget = cfg.tuning.budget
        self._levels = budget_levels(budget.distribution, budget.low, budget.high, budget.choices)
        self._retention = {level: cfg.retention_at(level) for level in self._levels}
        self._per_sample = budget.per == "sample"
        self._seed = cfg.trainer.seed

    def assign(self, batch: PackedBatch, step: int) -> PackedBatch:
        """The batch with a retention for every sample.

        Args:
            batch: samples with the same key in the same step get the same budget.
            step: of the optimizer, from 1.
        """
        keys = batch.keys if self._per_sample else [""] * len(batch.keys)
        budgets = [draw_budget(self._levels, self._seed, step, key) for key in keys]
        return replace(batch, retention=tuple(self._retention[budget] for budget in budgets))
