"""Which checkpoint a path means, and the configuration that is stored with it; nothing slow is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, latest_checkpoint, saved_config
from hybridprune_megatron.config.compose import change_config, load_config
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.schema import Config, ParallelConfig
from hybridprune_megatron.config.weight_files import holds_tensors

#: How a run was spread over machines, and in what its products were rounded, says nothing about its weights; one
#: process on a CPU holds them all.
ONE_PROCESS: dict[str, Any] = {
    "parallel": asdict(ParallelConfig(distributed_optimizer=False)),
    "trainer": {"num_nodes": 1, "devices": 1, "global_batch_size": 1},
    "model": {"spec": "torch"},
    "fp8": {"recipe": None},
}


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, bare weights too, or the newest complete one of a run or of its
    checkpoints folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if holds_tensors(path) or (path / RUN_FILE).is_file() or (path / "metadata.json").is_file():
        return path
    found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"--checkpoint={path}: no complete checkpoint there; give a run's folder, one of its "
            "checkpoints/step_<n> folders, a .safetensors file or a folder of them"
        )
    return found


def checkpoint_config(checkpoint: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a checkpoint, for one process.

    Args:
        checkpoint: from ``find_checkpoint``.
        overrides: with a checkpoint of a run, ``key=value`` changes to its own configuration; with bare weights, Hydra
            overrides that compose one, e.g. ``experiment=demo``.

    Raises:
        ValueError: a key or value the schema refuses.
    """
    if checkpoint.is_dir() and (checkpoint / RUN_FILE).is_file():
        saved: Any = saved_config(checkpoint)
    else:
        saved = plain_config(load_config(overrides))
        overrides = ()
    try:
        saved["model"]["hybrid_pattern"] = saved["model"]["hybrid_pattern"].replace("|", "")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{checkpoint / RUN_FILE} has no model.hybrid_pattern, so it is not of a run; give another checkpoint"
        ) from None
    try:
        return change_config(saved, overrides, ONE_PROCESS)
    except ValueError as error:
        raise ValueError(f"configuration of {checkpoint}: {error}") from error
