"""Finetunes a hybrid video language model under token reduction; ``--help`` lists what can be set.

    hybridprune finetune experiment=demo reduction.budget=0.35 trainer.max_steps=50
    torchrun --nproc_per_node 2 recipes/finetune.py experiment=demo parallel=tp2
    hybridprune finetune -m experiment=demo reduction.budget=0.5,0.25    # a sweep: a run for every combination

The same command again continues from the newest complete checkpoint in ``<output_dir>/checkpoints``. SIGTERM, SIGUSR1,
Ctrl-C and a lost terminal make it save after the running step and exit with status 75; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from hybridprune_megatron.config import Config, parse_command_line
from hybridprune_megatron.config.checkpoint_folder import checkpoint_step, newest_of_run
from hybridprune_megatron.config.files import check_tracking_server
from hybridprune_megatron.config.one_line import keep_traceback, one_line_errors
from hybridprune_megatron.config.sweep import OPTIONS
from hybridprune_megatron.engine.deterministic import prepare
from hybridprune_megatron.engine.gpus import check_gpus
from hybridprune_megatron.engine.launch import Launch, check_launch, launch_overrides, read_launch
from hybridprune_megatron.engine.preemption import hold_stop_signals
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.engine.run_lock import hold_folder
from hybridprune_megatron.engine.train_log import VALIDATION_LOG, read_train_log
from hybridprune_megatron.evaluation.sweep import array_task, overrides_of_task, sweep


def finetune(cfg: Config, launch: Launch) -> None:
    """Trains as configured, from the start or from the newest checkpoint, and says what came of it."""

    def say(line: str) -> None:
        if launch.rank == 0:
            print(line, flush=True)

    if is_finished(cfg):
        steps = f"trainer.max_steps={cfg.trainer.max_steps}"
        say(f"nothing to do: {steps} steps are done; raise it, or give output_dir=...\n{what_next(cfg)}")
        return
    import torch

    from hybridprune_megatron.cost.reach import idle_line
    from hybridprune_megatron.cost.training import StepCost
    from hybridprune_megatron.data.task_encoder import TrainLoader
    from hybridprune_megatron.data.validation_set import ValidationSet
    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.trainer import build_trainer, start_experiment
    from hybridprune_megatron.models.build import build_model, fp32_line

    if cfg.optim.warmup_steps >= cfg.trainer.max_steps and cfg.optim.decay_steps is None:
        say(f"optim.warmup_steps={cfg.optim.warmup_steps} is cut to end before trainer.max_steps")
    if idle := idle_line(cfg.reduction, cfg.model.hybrid_pattern, cfg.reduction.budget):
        say(idle)
    if slow := fp32_line(cfg, torch.cuda.is_available()):
        say(slow)
    built = partial(build_model, cfg, fused_gradients=True)
    module = HybridPruneModule(cfg, built, partial(TrainLoader, cfg), costs=StepCost(cfg))
    trainer = build_trainer(cfg, launch, partial(ValidationSet, cfg))
    start_experiment(trainer, cfg)
    trainer.fit(module)
    if trainer.global_step >= cfg.trainer.max_steps:
        say(what_next(cfg))


def is_finished(cfg: Config) -> bool:
    """Whether a run that would resume has no step left, and no validation that a stop prevented."""
    newest = newest_of_run(cfg) if cfg.exp_manager.get("resume_if_exists") else None
    if newest is None or checkpoint_step(newest) < cfg.trainer.max_steps:
        return False
    if not cfg.validation_steps:
        return True
    log = Path(cfg.output_dir) / VALIDATION_LOG
    return log.is_file() and any(row["step"] >= cfg.trainer.max_steps for row in read_train_log(log))


def what_next(cfg: Config) -> str:
    """What a finished run left, and the commands that people give next."""
    run = cfg.output_dir
    lines = [f"{run}: step {cfg.trainer.max_steps}, checkpoints/ and train_log.jsonl; next:"]
    if cfg.data.validation is not None:
        lines.append(f"  hybridprune evaluate checkpoint={run}")
    lines.append(f"  hybridprune plot {run}")
    lines.append(f"  hybridprune export --checkpoint {run} --out {run}/hf")
    return "\n".join(lines)


@one_line_errors("finetune")
def main(argv: list[str] | None = None) -> None:
    """Checks the configuration, and only then loads what is slow to import.

    Args:
        argv: options and overrides; None: those of the process.
    """
    launch = read_launch()
    overrides = sys.argv[1:] if argv is None else argv
    if any(option in overrides for option in OPTIONS):
        swept, task = [each for each in overrides if each not in OPTIONS], array_task()
        if task is None:
            sys.exit(sweep(swept, launch))
        overrides = overrides_of_task(swept, task)
    overrides = [*overrides, *launch_overrides(launch, overrides)]
    cfg = parse_command_line(overrides)
    check_launch(launch, cfg.trainer.num_nodes, cfg.trainer.devices)
    check_gpus()
    prepare(cfg.trainer.deterministic, os.environ)
    if launch.rank == 0:
        hold_folder(Path(cfg.output_dir))
        # This rank is the one that logs.
        check_tracking_server(cfg)
    hold_stop_signals(say=launch.rank == 0)
    quiet_libraries()

    from nemo.core.config import hydra_runner
    from omegaconf import DictConfig

    from hybridprune_megatron.config.compose import CONF_DIR, hydra_overrides, register_schema
    from hybridprune_megatron.engine.parallel import shut_down

    register_schema()
    # Where NeMo's runner reads them, in the form that Hydra takes.
    sys.argv[1:] = hydra_overrides(overrides)
    failures: list[BaseException] = []

    @hydra_runner(config_path=str(CONF_DIR), config_name="config")
    def run(_: DictConfig) -> None:
        # Hydra would compose what has been checked once more, and print a traceback of what is raised here.
        try:
            finetune(cfg, launch)
        except BaseException as error:
            if not isinstance(error, SystemExit):
                keep_traceback(Path(cfg.output_dir) / "logs", launch.rank)
            failures.append(error)

    try:
        run()
        if failures:
            raise failures[0]
    finally:
        shut_down()
