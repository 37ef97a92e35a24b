"""Whether a Hugging Face folder is of the model that a run configures, beyond what shapes tell."""

from __future__ import annotations

from dataclasses import asdict

from hybridprune_megatron.config.flat import leaves
from hybridprune_megatron.config.model_schema import ModelConfig
from hybridprune_megatron.huggingface.folder import model_values, read_config
from hybridprune_megatron.huggingface.source import TranslatedWeights

# Speed, the longest context, how a router learns, the size that frames are shown at, and how the tower's prefix tokens
# divide.
_FREE = {
    "name",
    "mamba_chunk_size",
    "experts.bias_update_rate",
    "max_sequence_length",
    "vision.frame_size",
    "vision.num_cls_tokens",
    "vision.num_register_tokens",
}


def check_same_model(weights: TranslatedWeights, model: ModelConfig) -> None:
    """Compares what the folder's config.json says with the configuration.

    Raises:
        ValueError: naming the first setting that differs.
    """
    theirs = model_values(model.name, read_config(weights.path), weights.files.shape, weights.table)
    ours = dict(leaves(asdict(model)))
    ours["hybrid_pattern"] = model.hybrid_pattern.replace("|", "")
    for key, value in leaves(theirs):
        if key not in _FREE and ours.get(key) != value:
            raise ValueError(f"its config.json says {key}={value}, and model.{key}={ours.get(key)}; set the same")
