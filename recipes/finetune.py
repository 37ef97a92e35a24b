"""Finetunes a hybrid video language model under token reduction; ``--help`` lists what can be set.

    python recipes/finetune.py experiment=demo reduction.budget=0.35 trainer.max_steps=50
    torchrun --nproc_per_node 2 recipes/finetune.py experiment=demo parallel=tp2

The same command again goes on from the newest complete checkpoint in ``<output_dir>/checkpoints``. SIGTERM and SIGUSR1
make it save after the running step and exit with status 75.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from hybridprune_megatron.config import Config, parse_command_line
from hybridprune_megatron.engine.launch import Launch, check_launch, launch_overrides, read_launch
from hybridprune_megatron.engine.preemption import hold_stop_signals
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.engine.run_lock import hold_folder


def finetune(cfg: Config, launch: Launch) -> None:
    """Trains as configured, from the start or from the newest checkpoint."""
    from hybridprune_megatron.data.task_encoder import build_train_loader
    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.trainer import build_trainer, start_experiment
    from hybridprune_megatron.models.build import build_model

    module = HybridPruneModule(cfg, partial(build_model, cfg, fused_gradients=True), partial(build_train_loader, cfg))
    trainer = build_trainer(cfg, launch)
    start_experiment(trainer, cfg)
    trainer.fit(module)


def main() -> None:
    """Checks the configuration, and only then loads what is slow to import."""
    try:
        launch = read_launch()
        sys.argv += launch_overrides(launch, sys.argv[1:])
        cfg = parse_command_line(sys.argv[1:])
        check_launch(launch, cfg.trainer.num_nodes, cfg.trainer.devices)
        if launch.rank == 0:
            hold_folder(Path(cfg.output_dir))
    except ValueError as error:
        sys.exit(f"configuration error: {error}")
    hold_stop_signals()
    quiet_libraries()

    from nemo.core.config import hydra_runner
    from omegaconf import DictConfig, OmegaConf

    from hybridprune_megatron.config.compose import CONF_DIR, register_schema
    from hybridprune_megatron.engine.parallel import shut_down

    register_schema()

    @hydra_runner(config_path=str(CONF_DIR), config_name="config")
    def run(composed: DictConfig) -> None:
        cfg = OmegaConf.to_object(composed)
        assert isinstance(cfg, Config), type(cfg)
        finetune(cfg, launch)

    try:
        run()
    finally:
        shut_down()


# Megatron's checkpoint writer and the data workers start processes that import this file.
if __name__ == "__main__":
    main()
