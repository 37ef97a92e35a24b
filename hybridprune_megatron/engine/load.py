"""A training model from its checkpoint, whole in one process."""

from __future__ import annotations

from pathlib import Path

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel
from hybridprune_megatron.engine.weights import load_initial_weights
from hybridprune_megatron.models.build import build_model
from hybridprune_megatron.models.lora import merge_adapters
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


def load_model(checkpoint: Path, cfg: Config) -> VideoLanguageModel:
    """Builds the model and loads the weights of a checkpoint of any parallel layout, adapters merged.

    Args:
        checkpoint: from ``config.stored_run.find_checkpoint``.
        cfg: from ``config.stored_run.checkpoint_config``.

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
