"""The configuration of an exported Hugging Face folder, from its own files; nothing slow is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.compose import change_config
from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.legacy import nested
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.config.stored_run import ONE_PROCESS
from hybridprune_megatron.method.schedule import Listed

#: What config.json of an export calls its model.
MODEL_TYPE = "hybridprune_vl"
#: Sizes of the language model by their name in config.json, with their name here.
SIZE_NAMES = {
    "hybrid_override_pattern": "hybrid_pattern",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
    "chunk_size": "mamba_chunk_size",
    "layer_norm_epsilon": "norm_epsilon",
}
#: What else is read of config.json.
_OTHER_NAMES = {
    "max_position_embeddings": "max_sequence_length",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "experts": "experts",
    "vision": "vision",
}
_INDEX = "model.safetensors.index.json"
_FILES = ("config.json", "processor_config.json", "generation_config.json", "model.safetensors", _INDEX)
#: Of processor_config.json: how conversations and videos become tokens.
_DATA_KEYS = ("sampling", "num_frames", "fps", "max_frames", "frame_text", "conversation")


def is_export(path: str | Path) -> bool:
    """Whether a path is a folder that ``hybridprune export`` wrote (without ``--plain``)."""
    try:
        settings = read_json(Path(path) / "config.json")
    except ValueError:
        return False
    return isinstance(settings, dict) and settings.get("model_type") == MODEL_TYPE


def export_config(folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration that an export would have as a checkpoint, for one process.

    Its data set, optimizer and steps are unknown and stand for nothing. A score, schedule or front by a dotted path is
    imported only if an override names it.

    Args:
        overrides: ``key=value`` changes.

    Raises:
        ValueError: a file lacks what is read of it or lies elsewhere, or a key or value the schema refuses.
    """
    check_own_files(folder)
    settings, processor = (_read_object(folder / name) for name in ("config.json", "processor_config.json"))
    try:
        saved = _as_run(settings, processor, folder)
    except (KeyError, TypeError, IndexError, AttributeError, ConfigError) as error:
        raise _unusable(folder, f"{type(error).__name__}: {error}") from None
    stored = (settings["reduction"] or {}).get("retention")
    try:
        cfg = change_config(saved, overrides, ONE_PROCESS)
        solved_again = any(override.lstrip("+").startswith("reduction.") for override in overrides)
        if stored and not solved_again and list(stored) != list(cfg.retention_by_layer):
            # What the export computes counts, however it was solved.
            saved["reduction"]["schedule"] = {"name": Listed.name, "retention": stored}
            cfg = change_config(saved, overrides, ONE_PROCESS)
    except (ValueError, TypeError) as error:
        raise ValueError(f"configuration of {folder}: {error}") from error
    return cfg


def check_own_files(folder: Path) -> None:
    """What is read of an export lies in its folder, weights too.

    Raises:
        ValueError: naming the first file that does not.
    """
    for name in _FILES:
        file_inside(folder, name)
    index = folder / _INDEX
    if index.is_file():
        named = read_json(index)
        shards = named.get("weight_map") if isinstance(named, dict) else None
        if not isinstance(shards, dict):
            raise _unusable(folder, f"{_INDEX} has no weight_map")
        for name in shards.values():
            file_inside(folder, name)


def _as_run(settings: Mapping[str, Any], processor: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a run by group."""
    model = {ours: settings[theirs] for theirs, ours in (SIZE_NAMES | _OTHER_NAMES).items()}
    reduction = nested(dict(settings["reduction"] or {"budget": 1.0}))
    reduction.pop("retention", None)
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    return {
        "name": "export",
        "output_dir": "runs/export",
        "model": model | {"name": "export", "time_step_min": float(settings["time_step_limit"][0])},
        "data": {
            **{name: processor[name] for name in _DATA_KEYS},
            # Exports before 0.2 took an image as it was.
            "max_tiles": processor.get("max_tiles", 1),
            "tokenizer": str(folder),
            "sequence_length": settings["max_position_embeddings"],
        },
        "reduction": reduction,
        "optim": {"lr": 1.0},
        "trainer": {"max_steps": 1, "precision": "fp32" if dtype == "float32" else "bf16"},
        "parallel": {},
        "exp_manager": {},
    }


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path, infinity=True)
    if not isinstance(content, dict):
        raise _unusable(path.parent, f"{path.name} is not an object")
    return content


def _unusable(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder}: not an export that can be read ({reason}); write it again with hybridprune export")
