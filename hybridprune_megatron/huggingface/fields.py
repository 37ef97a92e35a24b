"""Every field of a foreign ``config.json``: read, known not to matter, or refused by name.

A field in no table is refused.

The tables hold what published folders and transformers (4 and 5) write. "Does not matter" means: not for what the model
computes from its weights. It may matter to how weights are drawn, to generation, or to another program's speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridprune_megatron.bounds import LARGEST

Shape = Callable[[str], tuple[int, ...]]

_UNKNOWN = "not a field that is known here, so it may change what the model computes; remove it if it does not"


@dataclass(frozen=True)
class Section:
    """The fields of one object of ``config.json``.

    Attributes:
        read: what the import takes sizes from, or compares with the weights.
        only: the values that a field may have, of which an absent field has the first.
        inert: what does not matter.
        aliases: other names of fields, as transformers reads them.
    """

    read: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]
    inert: frozenset[str]
    aliases: Mapping[str, str] = field(default_factory=dict)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of any configuration that transformers writes: what it is called, how it was saved, how text is generated.
_GENERIC = _names(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    auto_map custom_pipelines dtype finetuning_task id2label is_composition is_decoder label2id model_type name_or_path
    num_labels output_attentions output_hidden_states prefix problem_type return_dict task_specific_params
    tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_version use_bfloat16
    use_cache use_return_dict gradient_checkpointing chunk_size_feed_forward cross_attention_hidden_size
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
    """
)
_GENERIC_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    # Weights in another number format need its own scales and products.
    "quantization_config": (None,),
}

#: A Nemotron-H language model: ``nemotron_h``, or ``llm_config`` of a video model.
LANGUAGE = Section(
    read=_names(
        """
        hybrid_override_pattern layers_block_type num_hidden_layers hidden_size intermediate_size num_attention_heads
        num_key_value_heads head_dim mamba_num_heads mamba_head_dim ssm_state_size n_groups chunk_size vocab_size
        max_position_embeddings tie_word_embeddings layer_norm_epsilon norm_eps rms_norm_eps time_step_limit
        n_routed_experts num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size
        routed_scaling_factor n_group topk_group
        """
    ),
    only=_GENERIC_ONLY
    | {
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "use_conv_bias": (True,),
        "conv_kernel": (4,),
        "sliding_window": (None,),
        "n_shared_experts": (1,),
        # Weights of routed experts that do not add up to one, and routers that are not a sigmoid, are other models.
        "norm_topk_prob": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    # How weights are drawn, dropout (there is none here), caches, precision, speed, positions (there are none), the
    # inner width (which is heads times their width), and layers that predict several tokens (left alone).
    inert=_GENERIC
    | _names(
        """
        initializer_range rescale_prenorm_residual time_step_min time_step_max time_step_floor time_step_rank
        time_step_init_scheme time_step_scale attention_dropout hidden_dropout num_logits_to_keep use_mamba_kernels
        mamba_ssm_cache_dtype residual_in_fp32 moe_shared_expert_overlap output_router_logits aux_loss_alpha seq_aux
        router_aux_loss_coef rope_theta rope_scaling rope_parameters partial_rotary_factor expand
        num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern
        """
    ),
    aliases={
        "layer_types": "layers_block_type",
        "num_local_experts": "n_routed_experts",
        "attention_head_dim": "head_dim",
        "num_query_groups": "num_key_value_heads",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_min": "time_step_min",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_chunk_size": "chunk_size",
        "mamba_d_state": "ssm_state_size",
    },
)

#: Nemotron Nano V2 VL as a whole.
VIDEO = Section(
    read=_names(
        """
        llm_config text_config vision_config force_image_size downsample_ratio norm_mean norm_std patch_size
        vit_hidden_size projector_hidden_size
        """
    ),
    only=_GENERIC_ONLY
    | {
        "ps_version": ("v2",),
        "select_layer": (-1,),
        "sound_config": (None,),
        "use_backbone_lora": (0,),
        "use_llm_lora": (0,),
        # Two frames in one patch are another tower.
        "video_temporal_patch_size": (None, 1),
    },
    # Tokens are found by their text; how many images and frames are shown, at what rate, and what is dropped before the
    # model is up to the data and reduction groups. The language model's own tie_word_embeddings counts.
    inert=_GENERIC
    | _names(
        """
        tie_word_embeddings template system_message image_tag_type use_thumbnail max_sequence_length dynamic_image_size
        min_dynamic_patch max_dynamic_patch max_num_tiles pad2square use_flash_attn initializer_range
        img_context_token img_context_token_id img_start_token img_start_token_id img_end_token img_end_token_id
        image_token_id video_context_token video_context_token_id video_token_id
        sound_context_token sound_context_token_id video_pruning_rate separate_video_embedder
        """
    ),
)

_TOWER_ONLY = _GENERIC_ONLY | {
    "use_swiglu_ffn": (False,),
    "qkv_bias": (True,),
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-6,),
    "num_channels": (3,),
    "video_temporal_patch_size": (None, 1),
    "adaptor_names": (None, []),
    "feature_normalizer_config": (None,),
    "inter_feature_normalizer_config": (None,),
    "vitdet_window_size": (None,),
}
_TOWER_READ = _names(
    """
    hidden_size num_hidden_layers num_attention_heads mlp_ratio patch_size max_img_size num_cls_tokens num_registers
    norm_mean norm_std
    """
)
_TOWER_INERT = _GENERIC | _names(
    """
    attention_probs_dropout_prob hidden_dropout_prob drop_path_rate layerscale_value initializer_range
    initializer_factor image_size patch_dim video_patch_dim summary_idxs use_flash_attn tie_word_embeddings
    version max_resolution preferred_resolution adaptor_configs min_num_patches max_num_patches
    video_target_num_patches video_maintain_aspect_ratio video_prompt_version separate_video_embedder
    """
)
#: ``vision_config`` of a video model, in the words of RADIO's own code or of transformers.
TOWER = Section(_TOWER_READ | {"args"}, _TOWER_ONLY, _TOWER_INERT)
#: A RADIO folder of transformers.
RADIO = Section(_TOWER_READ, _TOWER_ONLY, _TOWER_INERT)
#: Of ``vision_config.args``, the 150 arguments of the tower's training, these change the tower; others are not read.
TOWER_ARGS_ONLY: dict[str, tuple[Any, ...]] = {
    "model_norm": (None, False),
    "normalize_patches": (None, False),
    "qk_norm": (None, False),
    "in_chans": (None, 3),
}

#: This project's own export.
OWN = Section(
    read=_names(
        """
        hybrid_override_pattern num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads
        head_dim mamba_num_heads mamba_head_dim ssm_state_size n_groups chunk_size vocab_size max_position_embeddings
        tie_word_embeddings layer_norm_epsilon time_step_limit experts vision
        """
    ),
    only=_GENERIC_ONLY | {"conv_kernel": (4,)},
    # What is dropped is set by the run; tokens are found by their text.
    inert=_GENERIC
    | _names(
        """
        reduction initializer_range image_token_id image_start_token_id image_end_token_id turn_token_id
        special_token_ids transformers_range
        """
    ),
)


class Fields:
    """One object of a ``config.json``, every field of which is known.

    Args:
        values: the object.
        section: its table.
        where: what stands before a field's name in messages, e.g. "llm_config.".

    Raises:
        ValueError: naming a field that is unknown, or has a value that is not supported.
    """

    def __init__(self, values: Any, section: Section, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"config.json has {where.rstrip('.')}={shown(values)}: expected an object")
        self.where = where
        self.values: dict[str, Any] = {}
        known = section.read | section.inert | section.only.keys()
        for name, value in values.items():
            own = section.aliases.get(name, name)
            if own not in known:
                raise self.refusal(name, _UNKNOWN, value)
            if own != name and own in values and values[own] != value:
                raise self.refusal(name, f"is another name of {own}, which is {shown(values[own])}", value)
            self.values[own] = value
        self.check_only(section.only)

    def check_only(self, only: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses the first field whose value is none of those supported."""
        for name, allowed in only.items():
            if name in self.values and self.values[name] not in allowed:
                words = " or ".join(dict.fromkeys(shown(each) for each in allowed))
                raise self.refusal(name, f"only {words} is supported")

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """A field as it stands; None where there is none."""
        return self.values.get(name)

    def whole(self, name: str, lowest: int = 1, default: int | None = None) -> int:
        """A whole number from ``lowest`` on."""
        value = self._wanted(name, default)
        if type(value) is not int or not lowest <= value <= LARGEST:
            raise self.refusal(name, f"expected a whole number from {lowest} to {LARGEST}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._wanted(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refusal(name, "expected a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._wanted(name, default)
        if type(value) is not bool:
            raise self.refusal(name, "expected true or false")
        return value

    def colours(self, name: str) -> list[float]:
        """Three finite numbers, one for each colour channel."""
        value = self._wanted(name, None)
        fits = isinstance(value, list) and len(value) == 3 and all(type(each) in (int, float) for each in value)
        if not fits or not all(map(math.isfinite, value)):
            raise self.refusal(name, "expected three finite numbers")
        return [float(each) for each in value]

    def refusal(self, name: str, words: str, value: Any = None) -> ValueError:
        """The error of one field."""
        return ValueError(f"config.json has {self.where}{shown(name)}={shown(self.values.get(name, value))}: {words}")

    def _wanted(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is None and name not in self.values:
            raise ValueError(f"config.json has no {self.where}{name}: fetch the folder again, or add the field")
        return value


def shown(value: Any) -> str:
    """A value of a configuration in a message: short, in ASCII, on one line."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() and value else None
    return f"{text if text is not None else json.dumps(value, default=str):.60}"


def dims(shape: Shape, name: str, count: int) -> tuple[int, ...]:
    """The sizes of a tensor that has ``count`` dimensions.

    Raises:
        ValueError: it has others.
    """
    found = shape(name)
    if len(found) != count or not all(found):
        raise ValueError(f"{name} is {found} in the folder: expected {count} dimensions")
    return found
