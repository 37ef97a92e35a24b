"""A whole run of the tiny model under Lightning, to be killed at a chosen moment; for ``tests.worlds.run_world``."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.groups import RunConfig
from hybridprune_megatron.config.schema import OptimConfig, ParallelConfig, ReductionConfig, TrainerConfig, TuningConfig


@dataclass
class _Model:
    init_checkpoint: str | None = None


@dataclass
class _Data:
    sequence_length: int = 32
    # Any name makes a job with trainer.eval_samples validate.
    validation: str | None = "held out"


@dataclass
class Job:
    """The part of ``Config`` that the engine reads."""

    output_dir: str
    trainer: TrainerConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: _Model = field(default_factory=_Model)
    data: _Data = field(default_factory=_Data)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    reduction: ReductionConfig = field(default_factory=lambda: ReductionConfig(budget=1.0))
    exp_manager: dict[str, Any] = field(default_factory=lambda: {"resume_if_exists": True, "seconds_to_sleep": 0})
    drops: bool = False

    validation_steps = RunConfig.validation_steps


def tiny_job(folder: Path, tensor: int = 1, pipeline: int = 1, **trainer: Any) -> Job:
    """Eight steps of two sequences, a checkpoint every three."""
    settings = {
        "max_steps": 8,
        "precision": "fp32",
        "global_batch_size": 2,
        "save_every_n_steps": 3,
        "seed": 7,
    } | trainer
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    return Job(str(folder), TrainerConfig(**settings), OptimConfig(lr=1e-2, warmup_steps=2), parallel)


def run_job(
    job: Any, dropout: float = 0.1, kill_at: str = "", nemo: bool = False, video: bool = False
) -> list[dict[str, Any]]:
    """Trains in the current world, resuming from the newest checkpoint in the folder.

    Args:
        job: what to train; a ``Config`` with ``video``.
        dropout: above 0, so that generators decide about digits.
        kill_at: "step:5" ends the process by SIGKILL before step 5; "save:6" while the checkpoint of step 6
            is written.
        nemo: through NeMo's exp_manager, as the recipe does it.
        video: the project's own model instead of a GPT.

    Returns:
        The rows of the step log.
    """
    from functools import partial

    import torch.distributed as dist

    from hybridprune_megatron.cost.training import StepCost
    from hybridprune_megatron.engine import checkpoint
    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.train_log import read_train_log
    from hybridprune_megatron.engine.trainer import build_trainer, resume_checkpoint, start_experiment
    from hybridprune_megatron.models.build import build_model
    from tests.engine.held_out import clips, counts
    from tests.engine.tiny import ClipLoader, CountingLoader, tiny_model

    what, _, number = kill_at.partition(":")
    sync_tree = checkpoint.sync_tree

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class DyingModule(HybridPruneModule):
        def training_step(self, dataloader_iter: Any) -> Any:
            if what == "step" and self.trainer.global_step + 1 == int(number):
                die()
            # At that moment the shards are on disk and the folder is not renamed yet.
            doomed = what == "save" and self.trainer.global_step + 1 == int(number)
            checkpoint.sync_tree = die if doomed else sync_tree
            return super().training_step(dataloader_iter)

    job.trainer.devices = dist.get_world_size()
    streams = job.trainer.global_batch_size
    if video:
        loader = partial(ClipLoader, streams=streams)
        module = DyingModule(job, partial(build_model, job), loader, costs=StepCost(job))
    else:
        module = DyingModule(job, partial(tiny_model, dropout=dropout), partial(CountingLoader, streams=streams))
    launch = Launch(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    trainer = build_trainer(job, launch, partial(clips if video else counts, job.trainer.eval_samples))
    if nemo:
        start_experiment(trainer, job)
        trainer.fit(module)
    else:
        trainer.fit(module, ckpt_path=resume_checkpoint(job, trainer.is_global_zero))
    return read_train_log(Path(job.output_dir) / "train_log.jsonl")
