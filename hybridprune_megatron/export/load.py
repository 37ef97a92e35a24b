"""A training model from its checkpoint, whole in one process, for the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, latest_checkpoint, saved_config
from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel
from hybridprune_megatron.engine.weights import holds_tensors, load_initial_weights
from hybridprune_megatron.models.build import build_model
from hybridprune_megatron.models.lora import merge_adapters
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

# How a run was spread over machines, and in what its products were rounded, says nothing about its weights; one process
# on a CPU holds them all.
_ONE_PROCESS: dict[str, Any] = {
    "parallel": {
        "tensor": 1,
        "pipeline": 1,
        "virtual_pipeline": 1,
        "context": 1,
        "expert": 1,
        "sequence_parallel": False,
        "distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    },
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
        saved = asdict(load_config(overrides))
        overrides = ()
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config), _uncut(saved), OmegaConf.from_dotlist(list(overrides)), _ONE_PROCESS
        )
        cfg = OmegaConf.to_object(merged)
    # What a foreign run.json holds, or an override, can be wrong in ways that only Python notices.
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"configuration of {checkpoint}: {' '.join(str(error).split())}; check the overrides"
        ) from None
    assert isinstance(cfg, Config), type(cfg)
    return cfg


def _uncut(saved: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose pipeline stages are one."""
    model = saved.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("hybrid_pattern"), str):
        raise ValueError("it has no model.hybrid_pattern")
    return {**saved, "model": {**model, "hybrid_pattern": model["hybrid_pattern"].replace("|", "")}}


def load_model(checkpoint: Path, cfg: Config) -> VideoLanguageModel:
    """Builds the model and loads the weights of a checkpoint of any parallel layout, adapters merged.

    Args:
        checkpoint: from ``find_checkpoint``.
        cfg: from ``checkpoint_config``.

    Raises:
        ValueError: the weights are of another model.
    """
    init_distributed(Launch())
    init_model_parallel(seed=cfg.trainer.seed)
    try:
        model = build_model(cfg)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"configuration of {checkpoint} describes a model that cannot be built: {' '.join(str(error).split())}"
        ) from None
    load_initial_weights(model, checkpoint, cfg.model)
    merge_adapters(model)
    return model.eval()
