"""Writes a training model as a Hugging Face folder that needs nothing of this project to run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import GenerationConfig

from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.outputs import check_output, whole_folder
from hybridprune_megatron.config.schema import Config, ModelConfig
from hybridprune_megatron.config.stored_export import SIZE_NAMES
from hybridprune_megatron.data.chat_template import CHAT_TEMPLATE
from hybridprune_megatron.data.conversation import (
    END_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    SYSTEM_TOKEN,
    TURN_TOKEN,
)
from hybridprune_megatron.data.prompt import special_token_id
from hybridprune_megatron.data.tokenizer import load_tokenizer
from hybridprune_megatron.engine.weights import whole_weights
from hybridprune_megatron.export import COMMAND
from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig, exported_settings
from hybridprune_megatron.export.copy_code import copy_code
from hybridprune_megatron.export.model_card import RunFacts, model_card
from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
from hybridprune_megatron.huggingface.files import copy_tokenizer, save_tensors
from hybridprune_megatron.huggingface.names import ExpertParts, Heads, WeightNames

_MODEL_CLASS = "modeling_hybridprune.HybridPruneForCausalLM"
_PROCESSOR_CLASS = "processing_hybridprune.HybridPruneProcessor"
_AUTO_MAP = {
    "AutoConfig": "configuration_hybridprune.HybridPruneConfig",
    "AutoModel": _MODEL_CLASS,
    "AutoModelForCausalLM": _MODEL_CLASS,
    "AutoModelForImageTextToText": _MODEL_CLASS,
    "AutoModelForMultimodalLM": _MODEL_CLASS,
    "AutoProcessor": _PROCESSOR_CLASS,
}


def export_model(
    model: nn.Module,
    cfg: Config,
    out_dir: str | Path,
    max_shard_size: str = "5GB",
    facts: RunFacts | None = None,
    inputs: Iterable[str | Path] = (),
) -> Path:
    """Writes weights, configuration, tokenizer, chat template, processor, code and model card.

    The folder appears whole or not at all; an earlier export is replaced, anything else that is there is refused.

    Args:
        model: the unsplit training model (tensor and pipeline parallel 1).
        cfg: its configuration; uses model, reduction and data (tokenizer, sampling, frame_text, conversation).
        max_shard_size: largest weights file, e.g. "5GB".
        facts: of the run, for the card (``run_facts.read_facts``).
        inputs: files and folders that the model came from.

    Returns:
        The folder.

    Raises:
        ValueError: the model is split, its weights do not fit its configuration, the tokenizer lacks a special token,
            or ``out_dir`` holds something else.
    """
    out_dir = Path(out_dir)
    inputs = (*inputs, cfg.data.tokenizer)
    check_output(out_dir, COMMAND, inputs)
    if cfg.parallel.model_parallel_size > 1:
        raise ValueError(
            f"the model is split over {cfg.parallel.model_parallel_size} processes: build it with parallel.tensor=1, "
            "parallel.pipeline=1, parallel.context=1 and load its checkpoint (hybridprune export does)"
        )
    config = hf_config(cfg)
    weights = hf_weights(model, cfg)
    _check_against_model(weights, config)
    with whole_folder(out_dir, COMMAND, inputs) as folder:
        _write_weights(folder, weights, max_shard_size)
        config.dtype = weights["language_model.backbone.embeddings.weight"].dtype
        config.save_pretrained(folder)
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        pad, end = tokenizer.pad_token_id, special_token_id(tokenizer, END_TOKEN)
        GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False).save_pretrained(folder)
        copy_tokenizer(Path(cfg.data.tokenizer), folder)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="ascii")
        _end_with_the_answer(folder)
        _write_json(folder / "processor_config.json", processor_settings(cfg))
        copy_code(folder, cfg.reduction.score)
        low, high = config.time_step_limit
        clamp = "as it comes, not clamped" if (low, high) == (0.0, "inf") else f"clamped to [{low}, {high}]"
        card = model_card(cfg, facts or RunFacts(), f"{clamp} (`time_step_limit`)")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out_dir


def hf_config(cfg: Config) -> HybridPruneConfig:
    """The export's configuration of a run."""
    model, tokenizer = cfg.model, load_tokenizer(cfg.data.tokenizer)
    vision = asdict(model.vision) if model.vision is not None else None
    special = [SYSTEM_TOKEN, TURN_TOKEN, END_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN]
    ids = {token: special_token_id(tokenizer, token) for token in (*special, IMAGE_TOKEN)}
    if max(ids.values()) >= model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: data.tokenizer={cfg.data.tokenizer} has the special token id "
            f"{max(ids.values())}; use the tokenizer the model was trained with"
        )
    config = HybridPruneConfig(
        **language_settings(model),
        vision=vision,
        reduction=exported_settings(cfg.reduction),
        image_token_id=ids[IMAGE_TOKEN],
        image_start_token_id=ids[IMAGE_START_TOKEN],
        image_end_token_id=ids[IMAGE_END_TOKEN],
        turn_token_id=ids[TURN_TOKEN],
        special_token_ids=sorted(ids.values()),
        eos_token_id=ids[END_TOKEN],
        pad_token_id=tokenizer.pad_token_id,
        architectures=["HybridPruneForCausalLM"],
    )
    config.auto_map = dict(_AUTO_MAP)
    return config


def language_settings(model: ModelConfig) -> dict[str, Any]:
    """The export's description of the language model."""
    return {
        **language_sizes(model),
        "max_position_embeddings": model.max_sequence_length,
        "initializer_range": model.init_std,
        "experts": asdict(model.experts) if model.experts is not None else None,
        "time_step_limit": [model.time_step_min, "inf"],
        "tie_word_embeddings": model.tie_embeddings,
    }


def language_sizes(model: ModelConfig) -> dict[str, Any]:
    """The sizes of a language model under the names of config.json: ours, the published one's and transformers'."""
    sizes = {theirs: getattr(model, ours) for theirs, ours in SIZE_NAMES.items()}
    return sizes | {"hybrid_override_pattern": model.hybrid_pattern.replace("|", "")}


def hf_weights(model: nn.Module, cfg: Config) -> dict[str, Tensor]:
    """The training model's weights under the export's names, on the CPU.

    Raises:
        ValueError: listing names that do not fit the configuration.
    """
    vision = cfg.model.vision
    heads = Heads(cfg.model.num_query_groups, cfg.model.kv_channels)
    blocks = vision.num_layers if vision is not None else 0
    experts = cfg.model.experts
    parts = ExpertParts.of(asdict(experts)) if experts is not None else None
    names = WeightNames("hybridprune", cfg.model.hybrid_pattern, heads, cfg.model.tie_embeddings, blocks, parts)
    converted = names.to_theirs(whole_weights(model))
    return {name: value.detach().cpu().contiguous() for name, value in converted.items()}


def processor_settings(cfg: Config) -> dict[str, Any]:
    """``processor_config.json`` of a run: how its data was made."""
    data, vision = cfg.data, cfg.model.vision
    return {
        "processor_class": "HybridPruneProcessor",
        "auto_map": {"AutoProcessor": _PROCESSOR_CLASS},
        "tokens_per_frame": vision.tokens_per_frame if vision is not None else 1,
        "frame_size": vision.frame_size if vision is not None else 1,
        "sampling": data.sampling if vision is not None else "none",
        "num_frames": data.num_frames,
        "fps": data.fps,
        "max_frames": data.max_frames,
        "max_tiles": data.max_tiles,
        "frame_text": data.frame_text,
        "conversation": data.conversation,
    }


def _end_with_the_answer(folder: Path) -> None:
    """Makes an answer's end the tokenizer's end of text.

    Programs stop there whatever the model says: lmms-eval hands ``tokenizer.eos_token_id`` to ``generate``.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        settings = read_json(path) if path.is_file() else {}
        if name == "tokenizer_config.json" or "eos_token" in settings:
            _write_json(path, settings | {"eos_token": END_TOKEN})


def _check_against_model(weights: Mapping[str, Tensor], config: HybridPruneConfig) -> None:
    """Names and shapes are those that the exported code will ask for."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in HybridPruneForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight", None)
    wrong = sorted(name for name, value in weights.items() if expected.get(name) != value.shape)
    missing = sorted(set(expected) - set(weights))
    if wrong or missing:
        raise ValueError(
            f"weights do not fit the configuration: unknown or misshaped {wrong or 'none'}, missing {missing or 'none'}"
        )


def _write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for filename, names in split.filename_to_tensors.items():
        save_tensors({name: weights[name] for name in names}, folder / filename, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")
