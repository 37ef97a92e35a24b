"""Builds the Lightning Trainer of a run and hands it to NeMo's exp_manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from omegaconf.errors import OmegaConfBaseException

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.checkpoint_folder import (
    checkpoint_folder,
    copies_folder,
    latest_checkpoint,
    newest_of_run,
    resume_point,
)
from hybridprune_megatron.engine.callbacks import StepCheckpoint, StepProgressBar, StopOnSignal, Validation
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.engine.run_lock import hold_folder
from hybridprune_megatron.engine.strategy import MegatronStrategy

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.engine.validation import Samples


def build_trainer(cfg: Config, launch: Launch, held_out: Callable[[], Samples] | None = None) -> Trainer:
    """A Trainer with the Megatron strategy, checkpoints and the progress bar; no logger yet (exp_manager adds them).

    Args:
        cfg: the run's configuration.
        launch: what started this process.
        held_out: called once before the first step if the run validates; None: it does not, whatever ``cfg`` says.
    """
    import torch

    checkpoints = StepCheckpoint(checkpoint_folder(cfg), cfg.trainer.save_every_n_steps)
    return Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        num_nodes=launch.num_nodes,
        devices=launch.local_world_size,
        strategy=MegatronStrategy(launch, checkpoint_folder(cfg)),
        # Precision is megatron's business; anything but 32 would make Lightning wrap the forward pass.
        precision="32-true",
        max_steps=cfg.trainer.max_steps,
        max_epochs=-1,
        logger=False,
        callbacks=[
            checkpoints,
            StopOnSignal(checkpoints),
            *([Validation(cfg, held_out)] if held_out is not None and cfg.validation_steps else []),
            StepProgressBar(),
        ],
        # Ours are among the callbacks; this switch is for Lightning's own.
        enable_checkpointing=True,
        enable_model_summary=False,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        # The loader hands every rank its own share.
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def resume_checkpoint(cfg: Config, say: bool) -> Path | None:
    """The checkpoint that a run continues from, None at its start; tells what it leaves out and what it takes.

    Args:
        cfg: ``output_dir`` is read.
        say: print (one rank does).

    Raises:
        ValueError: all checkpoints are damaged.
    """
    own, copies = checkpoint_folder(cfg), copies_folder(cfg)
    newest = newest_of_run(cfg)
    if newest is None or newest.parent == own:
        newest, damaged = resume_point(own)
        lines = [*damaged, *([f"resuming from {newest}"] if newest else [])]
    else:
        assert newest.parent == copies, (newest, copies)
        older = latest_checkpoint(own)
        lines = [f"resuming from the copy {newest}; the newest whole one in {own} is {older.name if older else 'none'}"]
    if say and lines:
        print("\n".join(lines), flush=True)
    return newest


def start_experiment(trainer: Trainer, cfg: Config) -> Path:
    """Locks the run's folder and calls NeMo's exp_manager: loggers, step timing, time limit, the checkpoint to resume.

    Args:
        trainer: from :func:`build_trainer`; changed in place.
        cfg: ``exp_manager`` is passed on. ``resume_if_exists`` finds our newest complete checkpoint.

    Returns:
        The folder of the logs.

    Raises:
        ValueError: another run writes the folder, or all checkpoints in it are damaged.
    """
    from nemo.utils.exp_manager import exp_manager

    if trainer.is_global_zero:
        hold_folder(Path(cfg.output_dir))
    settings: dict[str, Any] = dict(cfg.exp_manager)
    # exp_manager moves every file it finds in its folder into run_<n>/ when a run starts again; the step log,
    # the report and the plots in output_dir must stay where they are.
    log_dir = Path(settings.get("explicit_log_dir") or cfg.output_dir)
    if log_dir.resolve() == Path(cfg.output_dir).resolve():
        log_dir = log_dir / "logs"
    settings["explicit_log_dir"] = str(log_dir)
    settings["create_checkpoint_callback"] = False
    # NeMo gives MLflow's logger its run_name twice, which fails.
    wants_mlflow, mlflow = settings.pop("create_mlflow_logger", False), settings.pop("mlflow_logger_kwargs", None)
    if settings.get("resume_if_exists"):
        newest = resume_checkpoint(cfg, trainer.is_global_zero)
        # NeMo's own search knows other names ("*-last") and would warn that it finds none: ours is given as a path.
        settings["resume_from_checkpoint"] = None if newest is None else str(newest)
        settings["resume_if_exists"] = False
    quiet_libraries()
    try:
        exp_manager(trainer, settings)
    except OmegaConfBaseException as error:
        # Its keys are known to NeMo alone.
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"exp_manager.{error.full_key}: {reason}; give a key of NeMo's ExpManagerConfig") from error
    if wants_mlflow and trainer.is_global_zero:
        trainer.loggers = [*trainer.loggers, _mlflow_logger(cfg, mlflow or {})]
    # exp_manager lets megatron log at its own level.
    quiet_libraries()
    return log_dir


def _mlflow_logger(cfg: Config, given: Mapping[str, Any]) -> Logger:
    """MLflow's logger, by default with a database of its own in the run's folder."""
    from lightning.pytorch.loggers import MLFlowLogger

    settings = {"experiment_name": cfg.name, **{key: value for key, value in given.items() if value is not None}}
    if "tracking_uri" not in settings:
        # Not among the logs, which exp_manager moves away when a run starts again.
        folder = Path(cfg.output_dir).resolve()
        settings |= {"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", "artifact_location": str(folder / "mlruns")}
    return MLFlowLogger(**settings)
