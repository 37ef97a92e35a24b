"""What finetuning (the ``tuning`` group, trained parts) must agree on with the rest of the configuration."""

from __future__ import annotations

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.cross_checks import check_kept
from hybridprune_megatron.config.groups import RunConfig
from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET, language_targets
from hybridprune_megatron.method.budgets import budget_levels
from hybridprune_megatron.method.schedule import Listed


def check_tuning(cfg: RunConfig) -> None:
    """All checks of this file; raises ``ConfigError`` at the first that fails."""
    check_budgets(cfg)
    check_teacher(cfg)
    check_lr_scale(cfg)
    check_lora(cfg)


def check_budgets(cfg: RunConfig) -> None:
    """Every budget that may be drawn has a schedule."""
    budget = cfg.tuning.budget
    if budget.distribution == "fixed":
        return
    key = "tuning.budget.distribution"
    if cfg.model.vision is None:
        reason = f"model {cfg.model.name} has no vision tower (model.vision=null), so there is nothing to drop"
        raise fail(key, budget.distribution, reason, f"set {key}=fixed")
    if isinstance(cfg.reduction.schedule, Listed):
        reason = "reduction.schedule.retention is one fixed schedule, and every budget needs its own"
        raise fail(key, budget.distribution, reason, f"take another reduction.schedule, or set {key}=fixed")
    levels = budget_levels(budget.distribution, budget.low, budget.high, budget.choices)
    for name, level in (("low", min(levels)), ("high", max(levels))):
        try:
            check_kept(cfg, level, cfg.retention_at(level))
        except ValueError as error:
            source = "choices" if budget.distribution == "choice" else name
            raise ConfigError(f"tuning.budget.{source} draws {level}: {error}") from error


def check_teacher(cfg: RunConfig) -> None:
    """The teacher of a distillation knows something that the student does not."""
    distillation = cfg.tuning.distillation
    if not distillation.weight:
        return
    key = "tuning.distillation.teacher"
    if distillation.teacher == "initial" and cfg.model.init_checkpoint is None:
        reason = "model.init_checkpoint=null, so the initial weights are random"
        raise fail(key, distillation.teacher, reason, f"set model.init_checkpoint or {key}=self")
    if distillation.teacher == "self" and cfg.reduction.budget == 1 and cfg.tuning.budget.distribution == "fixed":
        reason = "nothing is dropped (reduction.budget=1), so the student is its own teacher"
        raise fail(key, distillation.teacher, reason, f"set {key}=initial or reduction.budget below 1")


def check_lr_scale(cfg: RunConfig) -> None:
    """A part with a learning rate of its own learns."""
    for part, factor in vars(cfg.optim.lr_scale).items():
        if factor != 1 and not getattr(cfg.model.trainable, part):
            key, switch = f"optim.lr_scale.{part}", f"model.trainable.{part}"
            raise fail(key, factor, f"{switch}=false, so this part does not learn", f"set {switch}=true or {key}=1")


def check_lora(cfg: RunConfig) -> None:
    """Adapters stand on parts that are to learn."""
    lora, trainable = cfg.tuning.lora, cfg.model.trainable
    if not lora.rank:
        return
    if lora.rank > cfg.model.hidden_size:
        reason = f"must be at most model.hidden_size={cfg.model.hidden_size}, one side of every linear"
        raise fail("tuning.lora.rank", lora.rank, reason, "set e.g. tuning.lora.rank=16")
    for part, targets in (("language", language_targets()), ("projector", (PROJECTOR_TARGET,))):
        named = [target for target in lora.targets if target in targets]
        if named and not getattr(trainable, part):
            switch = f"model.trainable.{part}"
            fix = f"set {switch}=true (its adapters learn, its weights stay)"
            raise fail("tuning.lora.targets", lora.targets, f"names {named[0]}, and {switch}=false", fix)
