"""What a Hugging Face folder says of its model, as plain JSON: its family, and its sizes as our ``model`` group."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.model_schema import ExpertsConfig, VisionConfig
from hybridprune_megatron.huggingface.fields import LANGUAGE, OWN, RADIO, VIDEO, Fields, Shape, dims, shown
from hybridprune_megatron.huggingface.names import ExpertParts, Heads, WeightNames
from hybridprune_megatron.huggingface.towers import video_model_vision
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
# Of Mamba's gated norm, which transformers gives the layer norm's epsilon and megatron always this one.
_GATED_NORM_EPSILON = 1e-5
# Step sizes end far below: an upper limit from here on is none.
_NO_LIMIT = 1e20


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ValueError: it is not there or no JSON object.
    """
    path = folder / "config.json"
    try:
        # transformers 4 writes the infinite limit of a step size as Infinity.
        values = read_json(file_inside(folder, path.name), infinity=True)
    except ValueError as error:
        raise ValueError(f"{error}: give the folder of a Hugging Face model") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: give the folder of a Hugging Face model")
    return values


def family_of(config: Values) -> str:
    """The family of a configuration.

    Raises:
        ValueError: one that is not known here.
    """
    found = _FAMILIES.get(str(config.get("model_type")))
    if found is None:
        raise ValueError(
            f"config.json has model_type={shown(config.get('model_type'))}: models of {', '.join(_FAMILIES)} can be "
            "read"
        )
    return found


def language_fields(config: Values) -> Fields:
    """The language model's part of a configuration, of which every field is known.

    Raises:
        ValueError: a field is not, or has a value that is not supported; also one of the rest.
    """
    family = family_of(config)
    if family != "nemotron_vl":
        return Fields(config, OWN if family == "hybridprune" else LANGUAGE)
    whole = Fields(config, VIDEO)
    name = "llm_config" if "llm_config" in whole else "text_config"
    if name == "llm_config" and whole.get("text_config") not in (None, whole.get("llm_config")):
        raise whole.refusal("text_config", "is another name of llm_config, which has other fields")
    if name not in whole:
        raise ValueError("config.json has no llm_config: fetch the folder again, or add the field")
    return Fields(whole.get(name), LANGUAGE, f"{name}.")


def weight_names(config: Values, names: Collection[str]) -> WeightNames:
    """The table for a folder.

    Raises:
        ValueError: the model is of another family, has layers or fields that are not supported, or lacks its output
            layer.
    """
    family = family_of(config)
    blocks = {int(match[1]) for name in names if (match := _BLOCK.match(name))}
    layer_scale = any(name.endswith("layer_scale1.lambda1") for name in names)
    if family == "radio":
        Fields(config, RADIO)
        return WeightNames(family, "", Heads(1, 1), blocks=len(blocks), layer_scale=layer_scale)
    language = language_fields(config)
    pattern = pattern_of(language)
    experts = ExpertParts.of(_expert_values(language)) if Experts.symbol in pattern else None
    # Before a rule is made for each of them.
    for count, words in ((len(pattern), "layers"), (experts.count if experts else 0, "routed experts")):
        if count > len(names):
            raise ValueError(f"config.json describes {count} {words}, and the folder has {len(names)} tensors")
    return WeightNames(
        family,
        pattern,
        Heads(language.whole("num_key_value_heads"), language.whole("head_dim")),
        _tied(language, names),
        len(blocks),
        experts,
        layer_scale,
    )


def _tied(language: Fields, names: Collection[str]) -> bool:
    """Whether the output layer is the embedding. transformers' nemotron_h never ties one that the files have."""
    tied = language.flag("tie_word_embeddings", default=False)
    if any(name.endswith("lm_head.weight") for name in names):
        return False
    if not tied:
        raise ValueError(
            f"the folder has no lm_head.weight, and config.json has {language.where}tie_word_embeddings=false: fetch "
            "the weights again, or set it to true if the output layer is the embedding"
        )
    return True


def pattern_of(language: Fields) -> str:
    """The hybrid layer pattern, from either of the two ways to write it.

    Raises:
        ValueError: none, two that differ, or layers that are not supported.
    """
    symbols = {word: symbol for symbol, kind in KINDS.items() for word in kind.huggingface}
    kinds, text = language.get("layers_block_type"), language.get("hybrid_override_pattern")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise language.refusal("layers_block_type", "expected a list of names")
    if text is not None and not isinstance(text, str):
        raise language.refusal("hybrid_override_pattern", "expected a text")
    pattern = text or "".join(symbols.get(kind, "?") for kind in kinds or ())
    odd = "".join(sorted(set(pattern) - set(KINDS))) or "none"
    if not pattern or odd != "none":
        raise ValueError(
            f"config.json has the layers {shown(text or kinds)}: supported are "
            f"{', '.join(f'{symbol} ({kind.label})' for symbol, kind in KINDS.items())}, not {shown(odd)}"
        )
    if kinds and pattern != "".join(symbols.get(kind, "?") for kind in kinds):
        raise language.refusal("layers_block_type", f"other layers than hybrid_override_pattern={shown(pattern)}")
    if language.get("num_hidden_layers") not in (None, len(pattern)):
        raise language.refusal("num_hidden_layers", f"{shown(pattern)} has {len(pattern)} layers")
    return pattern


def model_values(name: str, config: Values, shape: Shape, table: WeightNames) -> dict[str, Any]:
    """The ``model`` group of a folder's model, for ``conf/model/<name>.yaml``.

    Args:
        shape: of a tensor of theirs by name.
        table: from ``weight_names``.

    Raises:
        ValueError: a size that is not in the folder, or is none.
    """
    language = language_fields(config)
    prefix = "" if table.family == "nemotron_h" else "language_model."
    rows, width = dims(shape, f"{prefix}backbone.embeddings.weight", 2)
    if language.whole("hidden_size") != width:
        raise language.refusal("hidden_size", f"the embedding is {width} wide")
    # A vision model's embedding has rows for its own tokens.
    if "vocab_size" in language and language.whole("vocab_size") != rows and not table.blocks:
        raise language.refusal("vocab_size", f"the embedding has {rows} rows")
    values = {
        "name": name,
        "hybrid_pattern": table.pattern,
        "hidden_size": width,
        "ffn_hidden_size": language.whole("intermediate_size"),
        "num_attention_heads": language.whole("num_attention_heads"),
        "num_query_groups": table.heads.groups,
        "kv_channels": table.heads.width,
        "mamba_num_heads": language.whole("mamba_num_heads"),
        "mamba_head_dim": language.whole("mamba_head_dim"),
        "mamba_state_dim": language.whole("ssm_state_size"),
        "mamba_num_groups": language.whole("n_groups"),
        "mamba_chunk_size": language.whole("chunk_size", default=128),
        "vocab_size": rows,
        "max_sequence_length": language.whole("max_position_embeddings"),
        "tie_embeddings": table.tied,
        "norm_epsilon": _epsilon(language, table),
        "experts": _expert_values(language) if table.experts else None,
        "vision": _vision_values(config, language, shape, table) if table.blocks else None,
    }
    lowest = _lowest_step(language, table)
    return values | ({"time_step_min": lowest} if lowest else {})


def _epsilon(language: Fields, table: WeightNames) -> float:
    epsilon = language.number("layer_norm_epsilon", default=1e-5)
    for other in ("norm_eps", "rms_norm_eps"):
        if other in language and language.number(other) != epsilon:
            raise language.refusal(other, f"differs from layer_norm_epsilon={epsilon:g}")
    if epsilon != _GATED_NORM_EPSILON and "M" in table.pattern and table.family != "hybridprune":
        raise language.refusal(
            "layer_norm_epsilon",
            f"only {_GATED_NORM_EPSILON:g} is supported where there are Mamba layers, whose gated norm has the same "
            "epsilon in transformers and always that one here, as in megatron",
        )
    return epsilon


def _lowest_step(language: Fields, table: WeightNames) -> float:
    """Lower clamp of a Mamba layer's step size; 0: none."""
    limit = language.get("time_step_limit")
    if limit is None:
        return 0.0
    bounds = [_bound(each) for each in limit] if isinstance(limit, list) else []
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
        raise language.refusal("time_step_limit", "expected two bounds, 0 or more, rising")
    # Of theirs, transformers leaves the lower bound unread, and the original code does not.
    if bounds[1] < _NO_LIMIT or (bounds[0] and table.family != "hybridprune"):
        raise language.refusal("time_step_limit", "only [0.0, Infinity], no clamp, is supported")
    return bounds[0]


def _bound(value: Any) -> float:
    """A number as transformers 4, transformers 5 or this project writes it."""
    value = value.get("__float__") if isinstance(value, dict) else value
    if value in ("Infinity", "inf"):
        return math.inf
    return float(value) if type(value) in (int, float) else math.nan


def _expert_values(language: Fields) -> dict[str, Any]:
    if "experts" in language:
        return _own_group(ExpertsConfig, language, "experts")
    latent = language.whole("moe_latent_size") if "moe_latent_size" in language else None
    return {
        "num_experts": language.whole("n_routed_experts"),
        "experts_per_token": language.whole("num_experts_per_tok"),
        "ffn_hidden_size": language.whole("moe_intermediate_size"),
        "shared_ffn_hidden_size": language.whole("moe_shared_expert_intermediate_size", 0, default=0),
        "latent_size": latent,
        "routed_scaling": language.number("routed_scaling_factor", default=1.0),
        "num_groups": language.whole("n_group", default=1),
        "groups_per_token": language.whole("topk_group", default=1),
    }


def _vision_values(config: Values, language: Fields, shape: Shape, table: WeightNames) -> dict[str, Any]:
    if table.family == "hybridprune":
        return _own_group(VisionConfig, language, "vision")
    return video_model_vision(config, shape, table.blocks)


def _own_group(kind: type[ExpertsConfig | VisionConfig], fields: Fields, name: str) -> dict[str, Any]:
    """A group of our configuration inside of our own config.json."""
    values = fields.get(name)
    if not isinstance(values, dict) or any(isinstance(value, str | dict) for value in values.values()):
        raise fields.refusal(name, "expected an object of numbers")
    try:
        group = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        raise fields.refusal(name, " ".join(str(error).split())) from None
    assert isinstance(group, kind), type(group)
    return asdict(group)
