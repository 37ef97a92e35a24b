"""What finetuning, FP8 and the exp_manager group must agree on with the rest of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridprune_megatron.bounds import Range, Rule, check_value
from hybridprune_megatron.checks import ConfigError, closest, fail
from hybridprune_megatron.config.cross_checks import check_kept
from hybridprune_megatron.config.fp8_schema import TILE
from hybridprune_megatron.config.groups import RunConfig
from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET, language_targets
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.budgets import budget_levels
from hybridprune_megatron.method.schedule import Listed, layer_symbols


def check_tuning(cfg: RunConfig) -> None:
    """All checks of the tuning group; raises ``ConfigError`` at the first that fails."""
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


def check_validation(cfg: RunConfig) -> None:
    """What is kept or ended by validations has some, and keeps checkpoints that are saved."""
    trainer = cfg.trainer
    key, every, saves = "trainer.keep_every_n_steps", trainer.keep_every_n_steps, trainer.save_every_n_steps
    if every % saves:
        reason = f"must be a multiple of trainer.save_every_n_steps={saves}, at whose multiples checkpoints are saved"
        raise fail(key, every, reason, f"set e.g. {key}={-(-every // saves) * saves}")
    for name in ("keep_best", "early_stopping"):
        value = getattr(trainer, name)
        if value and not cfg.validation_steps:
            needed = {
                "trainer.eval_every_n_steps=0": trainer.eval_every_n_steps,
                "trainer.eval_samples=0": trainer.eval_samples,
                "data.validation=null": cfg.data.validation,
            }
            missing = next(text for text, given in needed.items() if not given)
            off = "null" if name == "keep_best" else "0"
            fix = f"set {missing.partition('=')[0]} or trainer.{name}={off}"
            raise fail(f"trainer.{name}", value, f"needs validations, and {missing}", fix)
    figure = trainer.keep_best
    if figure is not None and figure.endswith("_full") and not cfg.drops:
        other = figure.removesuffix("_full")
        reason = "nothing is dropped, so every pass is one with every token"
        raise fail("trainer.keep_best", figure, reason, f"set trainer.keep_best={other}")
    if cfg.validation_steps and cfg.fp8.recipe == "delayed":
        reason = "fp8.recipe=delayed scales by the passes before, and a validation's would change the training"
        fix = "set trainer.eval_every_n_steps=0 or fp8=tensorwise"
        raise fail("trainer.eval_every_n_steps", trainer.eval_every_n_steps, reason, fix)


def check_copies(cfg: RunConfig) -> None:
    """Copies of checkpoints do not lie among the checkpoints themselves."""
    folder = cfg.trainer.copy_checkpoints_to
    if folder is None:
        return
    own = Path(cfg.output_dir).absolute()
    if Path(folder).absolute().is_relative_to(own):
        reason = f"lies in output_dir={cfg.output_dir}, and what happens to that happens to the copies"
        fix = "give a folder on another disk, or null"
        raise fail("trainer.copy_checkpoints_to", folder, reason, fix)


def check_fp8(cfg: RunConfig) -> None:
    """FP8 has layers to run in, the kernels for it, and widths that divide; raises ``ConfigError`` at the first."""
    fp8 = cfg.fp8
    if fp8.recipe is None:
        return
    if cfg.trainer.precision != "bf16":
        reason = f"fp8.recipe={fp8.recipe} keeps weights and everything but the linears' products in bf16"
        raise fail("trainer.precision", cfg.trainer.precision, reason, "set trainer.precision=bf16 or fp8=none")
    if cfg.model.spec == "torch":
        reason = f"plain torch has no FP8, and fp8.recipe={fp8.recipe}"
        raise fail("model.spec", "torch", reason, "set model.spec=te or fp8=none")
    _check_layers(cfg)
    _check_widths(cfg)


def _check_layers(cfg: RunConfig) -> None:
    fp8, layers = cfg.fp8, cfg.model.num_layers
    if not fp8.first_last_layers_bf16:
        return
    # Megatron's own bound.
    most = layers // cfg.parallel.pipeline
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(fp8, name)
        if count > most:
            reason = f"must not exceed the {most} layers of a pipeline stage"
            raise fail(f"fp8.{name}", count, reason, f"lower fp8.{name}")
    if not any(fp8.quantizes(layer, layers) for layer in range(layers)):
        reason = (
            f"leaves none of the {layers} layers to FP8 with "
            f"fp8.num_layers_at_end_in_bf16={fp8.num_layers_at_end_in_bf16}"
        )
        fix = "lower either, or set fp8=none"
        raise fail("fp8.num_layers_at_start_in_bf16", fp8.num_layers_at_start_in_bf16, reason, fix)


def _check_widths(cfg: RunConfig) -> None:
    """Both sides of every linear in FP8, as a tensor-parallel rank holds it, divide by the tile."""
    tile, tensor = cfg.fp8.tile, cfg.parallel.tensor
    for key, width, split in _widths(cfg):
        own = width // tensor if split else width
        if own % tile:
            shared = split and tensor > 1
            share = f"{width} / parallel.tensor={tensor} = {own}" if shared else f"{own}"
            other = "fp8=tensorwise (16)" if tile > TILE["tensorwise"] else "fp8=none"
            fix = f"set {other}" + (" or lower parallel.tensor" if shared else "")
            raise fail(key, share, f"must be a multiple of {tile} for fp8.recipe={cfg.fp8.recipe}", fix)


def _widths(cfg: RunConfig) -> list[tuple[str, int, bool]]:
    """Name, size, and whether tensor parallelism splits it: inputs and outputs of the linears in FP8."""
    model = cfg.model
    symbols = layer_symbols(model.hybrid_pattern)
    present = {symbol for index, symbol in enumerate(symbols) if cfg.fp8.quantizes(index, len(symbols))}
    found = [("model.hidden_size", model.hidden_size, False)]
    for symbol, kind in KINDS.items():
        found += kind.fp8_widths(model) if symbol in present else []
    return found


_SWITCH = Rule(bool, optional=True)
#: What ``conf/config.yaml`` sets, and the switches next to it.
_RULES = {
    "explicit_log_dir": Rule(str, optional=True),
    "seconds_to_sleep": Rule(float, bound=Range(0, 3600)),
    "wandb_logger_kwargs": Rule(dict, optional=True),
    "mlflow_logger_kwargs": Rule(dict, optional=True),
    **dict.fromkeys(
        (
            "create_tensorboard_logger",
            "create_wandb_logger",
            "create_mlflow_logger",
            "create_checkpoint_callback",
            "resume_if_exists",
            "resume_ignore_no_checkpoint",
            "log_step_timing",
            "log_tflops_per_sec_per_gpu",
        ),
        _SWITCH,
    ),
}
#: What Lightning's MLFlowLogger is given.
_MLFLOW = {
    **dict.fromkeys(
        ("experiment_name", "run_name", "tracking_uri", "prefix", "artifact_location", "run_id"),
        Rule(str, optional=True),
    ),
    "tags": Rule(dict, optional=True),
}


def _check_mlflow(settings: Mapping[str, Any]) -> None:
    """MLflow's own keys are known, and it is not asked to write to a folder."""
    group = "exp_manager.mlflow_logger_kwargs"
    for name, value in settings.items():
        key = f"{group}.{name}"
        if name not in _MLFLOW:
            near = closest(str(name), _MLFLOW)
            fix = f"did you mean {near}?" if near else "leave it out"
            raise fail(key, value, f"unknown key; allowed are {', '.join(_MLFLOW)}", fix)
        check_value(key, value, _MLFLOW[name])
    uri = settings.get("tracking_uri")
    if uri is not None and (uri.startswith("file:") or not (":" in uri or uri == "databricks")):
        reason = "is a folder, and MLflow 3 writes to none"
        raise fail(
            f"{group}.tracking_uri", uri, reason, "give a server's address or a database, e.g. sqlite:///runs.db"
        )


def check_exp_manager(settings: Mapping[str, Any]) -> None:
    """What is set has the right type, checkpoints stay the run's own business, W&B and MLflow have what they need.

    Raises:
        ConfigError: the first that is wrong.
    """
    for name, rule in _RULES.items():
        if name in settings:
            check_value(f"exp_manager.{name}", settings[name], rule)
    if settings.get("create_checkpoint_callback"):
        reason = "NeMo's callback cannot write checkpoints in one move"
        fix = "leave it false, the run saves every trainer.save_every_n_steps steps by itself"
        raise fail("exp_manager.create_checkpoint_callback", True, reason, fix)
    if isinstance(settings.get("mlflow_logger_kwargs"), Mapping):
        _check_mlflow(settings["mlflow_logger_kwargs"])
    if settings.get("create_wandb_logger"):
        kwargs = settings.get("wandb_logger_kwargs")
        project = kwargs.get("project") if isinstance(kwargs, Mapping) else kwargs
        if not isinstance(project, str) or not project.strip():
            key = "exp_manager.wandb_logger_kwargs.project"
            raise fail(key, project, "exp_manager.create_wandb_logger=true needs a project", f"give +{key}=<project>")
