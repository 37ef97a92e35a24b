"""config.json from anywhere: each field is read, known not to matter, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.conftest import Refused, script
from tests.hostile.model_folders import Change, config, values_of, without_head

CHANGES: list[tuple[str, Any]] = [
    ("mlp_hidden_act", "silu"),
    ("mlp_hidden_act", None),
    ("mlp_hidden_act", ["relu2"]),
    ("mamba_hidden_act", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("use_bias", True),
    ("mamba_proj_bias", True),
    ("use_conv_bias", False),
    ("mamba_conv_bias", False),
    ("conv_kernel", 3),
    ("mamba_d_conv", 3),
    ("time_step_limit", [0.0, 0.05]),
    ("time_step_limit", [0.01, 1e30]),
    ("mamba_dt_limit", [0.0, 0.1]),
    ("time_step_limit", [0.0]),
    ("time_step_limit", "inf"),
    ("time_step_limit", [0.0, {"__float__": "NaN"}]),
    ("layer_norm_epsilon", 1e-6),
    ("layer_norm_epsilon", 0.0),
    ("layer_norm_epsilon", "1e-5"),
    ("norm_eps", 1e-6),
    ("rms_norm_eps", 1e-3),
    ("sliding_window", 128),
    ("quantization_config", {"quant_method": "fp8"}),
    ("norm_topk_prob", False),
    ("scoring_func", "softmax"),
    ("n_shared_experts", 2),
    ("per_layer_config", {"0": {"mlp_bias": True}}),
    ("pruned_heads", {"1": [0]}),
    ("is_encoder_decoder", True),
    ("embedding_multiplier", 12.0),
    ("logits_scaling", 2.0),
    ("block_configs", []),
    ("a_field\nof tomorrow", 1),
    ("hidden_size", "40"),
    ("hidden_size", 40.5),
    ("hidden_size", -40),
    ("hidden_size", True),
    ("hidden_size", None),
    ("hidden_size", [40]),
    ("hidden_size", 10**12),
    ("hidden_size", 2**31 - 1),
    ("intermediate_size", 2**31 - 1),
    ("num_attention_heads", 0),
    ("num_attention_heads", 7),
    ("num_key_value_heads", 3),
    ("num_query_groups", 4),
    ("attention_head_dim", 64),
    ("head_dim", {}),
    ("mamba_num_heads", 2**31 - 1),
    ("ssm_state_size", 9),
    ("n_groups", 3),
    ("chunk_size", 0),
    ("vocab_size", 1023),
    ("max_position_embeddings", "long"),
    ("tie_word_embeddings", "no"),
    ("num_hidden_layers", 9),
    ("layer_types", ["full_attention"]),
    ("layers_block_type", [["mamba"]]),
    ("layers_block_type", "M-*M"),
    ("hybrid_override_pattern", "M" * 10**6),
    ("hybrid_override_pattern", ["M"]),
    ("hybrid_override_pattern", ""),
    ("model_type", "llama"),
    ("model_type", ["nemotron_h"]),
    ("n_routed_experts", 10**9),
]


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=lambda each: f"{each!r:.40}")
def test_a_field_that_changes_the_model_is_refused_by_name(
    twins: dict[str, Path], refused_import: Callable[..., str], name: str, value: Any
) -> None:
    drop = ("layers_block_type",) if name == "hybrid_override_pattern" else ()
    only_experts = name == "n_routed_experts"
    line = refused_import(twins["experts" if only_experts else "language"], config(**{name: value}, drop=drop))
    # Some are named as what they are another name of, or by what they contradict.
    words = {
        "hybrid_override_pattern": "layers|hybrid_override_pattern|pattern",
        "layers_block_type": "layers",
        "mamba_d_conv": "conv_kernel|mamba_d_conv",
        "mamba_conv_bias": "use_conv_bias|mamba_conv_bias",
        "mamba_dt_limit": "time_step_limit|mamba_dt_limit",
        "num_query_groups": "num_query_groups|num_key_value_heads",
        "attention_head_dim": "head_dim",
        "layer_types": "layers_block_type",
        "intermediate_size": "intermediate_size|linear_fc1|cannot be built|ffn_hidden_size",
        "hidden_size": "hidden_size|cannot be built|embedding",
        "num_attention_heads": "num_attention_heads|linear_qkv|linear_proj",
        "num_key_value_heads": "num_key_value_heads|num_query_groups|not the sizes",
        "mamba_num_heads": "mamba_num_heads|cannot be built|mixer",
        "ssm_state_size": "mixer",
        "n_groups": "mamba_num_groups|mixer",
        "n_routed_experts": "1000000000 routed experts",
        "a_field\nof tomorrow": r"a_field\\nof tomorrow",
    }.get(name, name)
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (None, "ps_version", "v1"),
        (None, "select_layer", -2),
        (None, "sound_config", {"model_type": "parakeet"}),
        (None, "video_temporal_patch_size", 2),
        (None, "quantization_config", {"quant_method": "modelopt"}),
        (None, "use_llm_lora", 8),
        (None, "patch_size", 16),
        (None, "vit_hidden_size", 1280),
        (None, "projector_hidden_size", 49),
        (None, "force_image_size", None),
        (None, "force_image_size", 10**9),
        (None, "downsample_ratio", 0.3),
        (None, "norm_mean", [0.5, 0.5]),
        (None, "norm_std", [0.5, 0.5, "x"]),
        (None, "norm_std", [0.0, 1.0, 1.0]),
        (None, "llm_config", []),
        (None, "text_config", {"hidden_size": 1}),
        (None, "vision_config", [1]),
        (None, "unheard_of", 0),
        ("llm_config", "mlp_hidden_act", "gelu"),
        ("llm_config", "quantization_config", {}),
        ("llm_config", "layer_norm_epsilon", 1e-6),
        ("llm_config", "unheard_of", 0),
        ("vision_config", "layer_norm_eps", 1e-5),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "video_temporal_patch_size", 2),
        ("vision_config", "feature_normalizer_config", {"a": 1}),
        ("vision_config", "adaptor_names", ["siglip"]),
        ("vision_config", "vitdet_window_size", 8),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "num_attention_heads", "2"),
        ("vision_config", "num_cls_tokens", 6),
        ("vision_config", "norm_mean", [0.1, 0.1, 0.1]),
        ("vision_config", "hidden_size", 25),
        ("vision_config", "args", {"model": "vit_twin", "model_norm": True}),
        ("vision_config", "args", "x"),
        ("vision_config", "unheard_of", 0),
    ],
)
def test_a_field_of_a_video_model_too(
    twins: dict[str, Path], refused_import: Callable[..., str], group: str | None, name: str, value: Any
) -> None:
    line = refused_import(twins["video"], config(group, **{name: value}))
    assert re.search(f"{name}|num_registers|pixel_shuffle|image_std|frame_size", line), line
    assert group is None or group in line or "model.vision" in line, line


@pytest.mark.parametrize(
    ("twin", "name"),
    [
        ("language", "hidden_size"),
        ("language", "head_dim"),
        ("language", "ssm_state_size"),
        ("language", "max_position_embeddings"),
        ("language", "layers_block_type"),
        ("language", "model_type"),
        ("experts", "n_routed_experts"),
        ("experts", "num_experts_per_tok"),
        ("video", "force_image_size"),
        ("video", "llm_config"),
    ],
)
def test_a_missing_field_is_named(
    twins: dict[str, Path], refused_import: Callable[..., str], twin: str, name: str
) -> None:
    line = refused_import(twins[twin], config(drop=(name,)))
    assert name in line or ("layers" in line and name == "layers_block_type"), line


# What published folders hold besides sizes; values as NVIDIA's repositories have them.
PUBLISHED_LANGUAGE = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "eos_token_id": [2, 11],
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "rms_norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_limit": [0.0, float("inf")],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.4",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "num_nextn_predict_layers": 0,
    # Of transformers 4, for every model.
    "return_dict": True,
    "output_attentions": False,
    "torchscript": False,
    "is_decoder": False,
    "temperature": 1.0,
    "id2label": {"0": "LABEL_0"},
    "_name_or_path": "x",
}
PUBLISHED_VIDEO = {
    "auto_map": {"AutoConfig": "configuration.NemotronH_Nano_VL_V2_Config"},
    "eos_token_id": 11,
    "image_tag_type": "internvl",
    "img_context_token": "<image>",
    "img_context_token_id": 131072,
    "img_start_token": "<img>",
    "img_end_token": "</img>",
    "max_sequence_length": 131072,
    "template": "nemotron5h_5p5",
    "use_thumbnail": True,
    "video_context_token": "<video>",
    "video_context_token_id": 131081,
    "video_pruning_rate": 0.7,
    "torch_dtype": "bfloat16",
}
PUBLISHED_TOWER = {
    "architectures": ["RADIOModel"],
    "auto_map": {"AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig"},
    "adaptor_configs": {"siglip": {"fd_normalize": False}},
    "adaptor_names": None,
    "feature_normalizer_config": None,
    "inter_feature_normalizer_config": None,
    "max_resolution": 2048,
    "preferred_resolution": [768, 768],
    "version": "radio_v2.5-h",
    "vitdet_window_size": None,
    "separate_video_embedder": True,
    "model_type": "",
    "args": {"model": "vit_huge_patch16_224", "cpe_max_size": 2048, "amp": True, "lr_base": 1e-3, "model_norm": False},
}


def test_what_is_published_can_be_imported(twins: dict[str, Path], tmp_path: Path) -> None:
    for twin, groups in (
        ("language", {None: PUBLISHED_LANGUAGE}),
        ("experts", {None: PUBLISHED_LANGUAGE | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}}),
        ("video", {None: PUBLISHED_VIDEO, "llm_config": PUBLISHED_LANGUAGE, "vision_config": PUBLISHED_TOWER}),
    ):
        folder = Path(shutil.copytree(twins[twin], tmp_path / twin))
        before = values_of(folder)
        for group, fields in groups.items():
            config(group, **fields)(folder)
        assert values_of(folder) == before, twin


def test_the_tables_know_whatever_the_installed_transformers_writes() -> None:
    from transformers import NemotronHConfig, RadioConfig

    from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
    from hybridprune_megatron.huggingface.fields import LANGUAGE, OWN, RADIO, TOWER, Fields

    for written, sections in (
        (NemotronHConfig(hybrid_override_pattern="M*-E"), [LANGUAGE]),
        (RadioConfig(), [RADIO, TOWER]),
        (HybridPruneConfig(), [OWN]),
    ):
        for only_differences in (True, False):
            values = json.loads(written.to_json_string(use_diff=only_differences))
            for section in sections:
                Fields(values, section)


def test_the_other_ways_to_write_a_field_say_the_same(twins: dict[str, Path], tmp_path: Path) -> None:
    before = values_of(twins["language"])
    old = {"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 16, "attention_head_dim": 12}
    old |= {"hybrid_override_pattern": "M-*M", "mamba_dt_limit": [0.0, 1e30], "mamba_conv_bias": True}
    drop = (
        "n_groups",
        "conv_kernel",
        "chunk_size",
        "head_dim",
        "layers_block_type",
        "time_step_limit",
        "use_conv_bias",
    )
    folder = Path(shutil.copytree(twins["language"], tmp_path / "old"))
    config(drop=drop, **old)(folder)
    assert values_of(folder) == before
    config(layer_types=["linear_attention", "mlp", "full_attention", "linear_attention"])(folder)
    assert values_of(folder) == before


def test_another_epsilon_is_read_where_there_is_no_gated_norm(twins: dict[str, Path]) -> None:
    """The logits are compared in tests/parity."""
    assert values_of(twins["attention"])["norm_epsilon"] == 1e-2


def test_a_head_that_is_the_embedding_is_tied_where_the_configuration_says_so(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(twins["language"], tmp_path / "hf"))
    without_head(folder)
    config(tie_word_embeddings=True)(folder)
    assert values_of(folder)["tie_embeddings"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config(hidden_act="relu"), "hidden_act=relu"),
        (config(layer_norm_eps=1e-5), "layer_norm_eps"),
        (config(max_img_size=128), "max_img_size=128: the tensors have 64"),
        (config(mlp_ratio=4.0), "mlp_ratio"),
        (config(mlp_ratio=1e300), "mlp_ratio"),
        (config(num_attention_heads=[2]), "num_attention_heads"),
        (config(video_temporal_patch_size=2), "video_temporal_patch_size"),
        (config(unheard_of=2), "unheard_of"),
    ],
)
def test_a_tower_with_other_blocks_is_refused(
    twins: dict[str, Path], refused: Refused, tmp_path: Path, change: Change, words: str
) -> None:
    tower = Path(shutil.copytree(twins["radio"], tmp_path / "radio"))
    change(tower)
    arguments = [str(twins["language"]), "--tower", str(tower), "--frame-size", "32", "--name", "x", "--check"]
    assert words in refused(lambda: script("import_hf").main(arguments))
    for size in ("0", "-32", "33", "10000000000"):
        arguments[arguments.index("--tower") + 1] = str(twins["radio"])
        arguments[arguments.index("--frame-size") + 1] = size
        assert "frame_size" in refused(lambda: script("import_hf").main(arguments))
