"""What a Hugging Face folder says of its model, as plain JSON: its family, and its sizes as our ``model`` group."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from hybridprune_megatron.huggingface.names import ExpertParts, Heads, WeightNames
from hybridprune_megatron.layers.experts import Experts
from hybridprune_megatron.layers.kinds import KINDS

Values = Mapping[str, Any]

#: By ``model_type`` of config.json.
_FAMILIES = {
    "nemotron_h": "nemotron_h",
    "NemotronH_Nano_VL_V2": "nemotron_vl",
    "radio": "radio",
    "hybridprune_vl": "hybridprune",
}
_BLOCK = re.compile(r"(?:vision_model\.)?(?:radio_model\.model\.blocks|encoder\.layer)\.(\d+)\.")
# Heads of the ViTs that RADIO towers are, by timm's name.
_VIT_HEADS = {"vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 16}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ValueError: it is not there or no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give the folder of a Hugging Face model") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration: give the folder of a Hugging Face model")
    return values


def family_of(config: Values) -> str:
    """The family of a configuration.

    Raises:
        ValueError: one that is not known here.
    """
    found = _FAMILIES.get(str(config.get("model_type")))
    if found is None:
        raise ValueError(
            f"config.json has model_type={config.get('model_type')}: models of {', '.join(_FAMILIES)} can be read"
        )
    return found


def weight_names(config: Values, names: Collection[str]) -> WeightNames:
    """The table for a folder.

    Args:
        config: its config.json.
        names: of its tensors.

    Raises:
        ValueError: the model is of another family, or has layers that are not supported.
    """
    family = family_of(config)
    blocks = {int(match[1]) for name in names if (match := _BLOCK.match(name))}
    layer_scale = any(name.endswith("layer_scale1.lambda1") for name in names)
    if family == "radio":
        return WeightNames(family, "", Heads(1, 1), blocks=len(blocks), layer_scale=layer_scale)
    language = language_values(config)
    pattern = pattern_of(language)
    return WeightNames(
        family,
        pattern,
        Heads(language["num_key_value_heads"], language["head_dim"]),
        # transformers' nemotron_h ties nothing, whatever its configuration says.
        not any(name.endswith("lm_head.weight") for name in names),
        len(blocks),
        ExpertParts.of(_expert_values(language)) if Experts.symbol in pattern else None,
        layer_scale,
    )


def language_values(config: Values) -> Values:
    """The language model's part of a configuration."""
    for name in ("llm_config", "text_config"):
        if isinstance(config.get(name), dict):
            return config[name]
    return config


def pattern_of(language: Values) -> str:
    """The hybrid layer pattern, from either of the two ways to write it.

    Raises:
        ValueError: none, or layers that are not supported.
    """
    symbols = {word: symbol for symbol, kind in KINDS.items() for word in kind.huggingface}
    kinds = language.get("layers_block_type") or language.get("layer_types")
    pattern = language.get("hybrid_override_pattern") or "".join(symbols.get(kind, "?") for kind in kinds or ())
    odd = "".join(sorted(set(pattern) - set(KINDS))) or "none"
    if not pattern or odd != "none":
        raise ValueError(
            f"config.json has the layers {pattern or kinds}: supported are "
            f"{', '.join(f'{symbol} ({kind.label})' for symbol, kind in KINDS.items())}, not {odd}"
        )
    return pattern


def model_values(name: str, config: Values, shape: Callable[[str], tuple[int, ...]], table: WeightNames) -> Values:
    """The ``model`` group of a folder's model, for ``conf/model/<name>.yaml``.

    Args:
        name: of the model.
        config: config.json.
        shape: of a tensor of theirs by name.
        table: from ``weight_names``.

    Raises:
        ValueError: a size that is not in the folder.
    """
    language = language_values(config)
    prefix = "" if table.family == "nemotron_h" else "language_model."
    vision = None
    if table.blocks:
        vision = _vision_values(config, shape, table)
    return {
        "name": name,
        "hybrid_pattern": table.pattern,
        "hidden_size": language["hidden_size"],
        "ffn_hidden_size": language["intermediate_size"],
        "num_attention_heads": language["num_attention_heads"],
        "num_query_groups": table.heads.groups,
        "kv_channels": table.heads.width,
        "mamba_num_heads": language["mamba_num_heads"],
        "mamba_head_dim": language["mamba_head_dim"],
        "mamba_state_dim": language["ssm_state_size"],
        "mamba_num_groups": language["n_groups"],
        "mamba_chunk_size": language.get("chunk_size", 128),
        # A vision model's embedding has rows for its own tokens.
        "vocab_size": shape(f"{prefix}backbone.embeddings.weight")[0],
        "max_sequence_length": language["max_position_embeddings"],
        "tie_embeddings": table.tied,
        "norm_epsilon": language.get("layer_norm_epsilon", 1e-5),
        "experts": _expert_values(language) if table.experts else None,
        "vision": vision,
    }


def _expert_values(language: Values) -> Values:
    if language.get("experts"):
        return dict(language["experts"])
    if not language.get("norm_topk_prob", True):
        raise ValueError(
            "config.json has norm_topk_prob=false: routed experts' weights that do not add up to one are not supported"
        )
    return {
        "num_experts": language["n_routed_experts"],
        "experts_per_token": language["num_experts_per_tok"],
        "ffn_hidden_size": language["moe_intermediate_size"],
        "shared_ffn_hidden_size": language.get("moe_shared_expert_intermediate_size") or 0,
        "latent_size": language.get("moe_latent_size"),
        "routed_scaling": float(language.get("routed_scaling_factor", 1.0)),
        "num_groups": language.get("n_group", 1),
        "groups_per_token": language.get("topk_group", 1),
    }


def _vision_values(config: Values, shape: Callable[[str], tuple[int, ...]], table: WeightNames) -> Values:
    if table.family == "hybridprune":
        return dict(config["vision"])
    tower = "vision_model.radio_model.model."
    _, positions, width = shape(tower + "patch_generator.pos_embed")
    patch = isqrt(shape(tower + "patch_generator.embedder.weight")[1] // 3)
    skipped = shape(tower + "patch_generator.cls_token.token")[0]
    # How class and register tokens divide changes no shape and no feature.
    classes = min(3, skipped)
    values = {
        "hidden_size": width,
        "num_layers": table.blocks,
        "num_attention_heads": _vision_heads(config),
        "intermediate_size": shape(tower + "blocks.0.mlp.fc1.weight")[0],
        "patch_size": patch,
        "frame_size": config["force_image_size"],
        "position_grid_px": isqrt(positions) * patch,
        "num_cls_tokens": classes,
        "num_register_tokens": skipped - classes,
        "projector_hidden_size": shape("mlp1.1.weight")[0],
        "pixel_shuffle": config.get("downsample_ratio", 0.5),
    }
    for ours, theirs in (("image_mean", "norm_mean"), ("image_std", "norm_std")):
        if theirs in config:
            values[ours] = list(config[theirs])
    return values


def _vision_heads(config: Values) -> int:
    vision = config.get("vision_config") or {}
    if "num_attention_heads" in vision:
        return int(vision["num_attention_heads"])
    model = str((vision.get("args") or {}).get("model"))
    heads = next((heads for name, heads in _VIT_HEADS.items() if model.startswith(name)), None)
    if heads is None:
        raise ValueError(
            f"config.json has vision_config.args.model={model}, whose heads are not known: add "
            "vision_config.num_attention_heads to config.json"
        )
    return heads
