"""A Hugging Face folder from anywhere: each field is read, or refused by name, and no file outside of it is opened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridprune_megatron.huggingface.folder import model_values, read_config
from hybridprune_megatron.huggingface.source import INDEX_FILE, TranslatedWeights, open_weights
from tests.hostile.conftest import Refused, contents, script

Change = Callable[[Path], Any]


@pytest.fixture
def run(refused: Refused, tmp_path: Path) -> Callable[..., str]:
    """Imports a changed copy of a folder, which has to end in one line and write nothing."""

    def call(source: Path, change: Change, *more: str) -> str:
        folder = Path(shutil.copytree(source, tmp_path / "hf"))
        change(folder)
        before = contents(tmp_path)
        arguments = [str(folder), "--name", "twin", "--out", str(tmp_path / "out"), "--conf", str(tmp_path), *more]
        (tmp_path / "model").mkdir()
        line = refused(lambda: script("import_hf").main(arguments))
        (tmp_path / "model").rmdir()
        assert contents(tmp_path) == before
        assert "Traceback" not in line
        return line

    return call


def values_of(folder: Path) -> dict[str, Any]:
    weights = open_weights(folder)
    assert isinstance(weights, TranslatedWeights)
    return model_values("twin", read_config(folder), weights.files.shape, weights.table)


def config(group: str | None = None, drop: tuple[str, ...] = (), **fields: Any) -> Change:
    """Changes fields of config.json, or of one of its objects."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        values = whole[group] if group else whole
        values |= fields
        for name in drop:
            del values[name]
        (folder / "config.json").write_text(json.dumps(whole))

    return change


def text(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


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
    twins: dict[str, Path], run: Callable[..., str], name: str, value: Any
) -> None:
    drop = ("layers_block_type",) if name == "hybrid_override_pattern" else ()
    only_experts = name == "n_routed_experts"
    line = run(twins["experts" if only_experts else "language"], config(**{name: value}, drop=drop))
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
    twins: dict[str, Path], run: Callable[..., str], group: str | None, name: str, value: Any
) -> None:
    line = run(twins["video"], config(group, **{name: value}))
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
def test_a_missing_field_is_named(twins: dict[str, Path], run: Callable[..., str], twin: str, name: str) -> None:
    line = run(twins[twin], config(drop=(name,)))
    assert name in line or ("layers" in line and name == "layers_block_type"), line


def index(change: Callable[[dict[str, Any]], Any]) -> Change:
    def of(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        changed = change(content)
        (folder / INDEX_FILE).write_text(json.dumps(content if changed is None else changed))

    return of


def renamed(name: str) -> Change:
    """The file of one tensor lies elsewhere, and the index says so."""

    def change(content: dict[str, Any]) -> None:
        content["weight_map"]["backbone.norm_f.weight"] = name

    return index(change)


def moved_away(folder: Path) -> None:
    """A weight file is a link to one outside."""
    file = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"]["backbone.norm_f.weight"]
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], name: str = "backbone.norm_f.weight") -> Change:
    def of(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        file = folder / content["weight_map"][name]
        values = load_file(file)
        change(values)
        save_file(values, file, metadata={"format": "pt"})

    return of


def in_float8(values: dict[str, torch.Tensor]) -> None:
    values["backbone.norm_f.weight"] = values["backbone.norm_f.weight"].to(torch.float8_e4m3fn)


def without_head(folder: Path) -> None:
    tensors(lambda values: values.pop("lm_head.weight"), "lm_head.weight")(folder)
    index(lambda content: content["weight_map"].pop("lm_head.weight") and None)(folder)
    config(tie_word_embeddings=False)(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (text("config.json", "[" * 200_000), r"config.json cannot be read \(nested too deeply\)"),
        (text("config.json", "[]"), "is not a JSON object"),
        (text("config.json", b"\xff\xfe"), "not UTF-8"),
        (text("config.json", '{"model_type": NaN}'), "NaN is not a number"),
        (text("config.json", '{"model_type": "\\ud800"}'), "lone surrogate"),
        (text("config.json", '{"a": ' + "9" * 5000 + "}"), "digits"),
        (text("config.json", ""), "cannot be read"),
        (text(INDEX_FILE, "[" * 200_000), "nested too deeply"),
        (text(INDEX_FILE, "{"), "index.json cannot be read"),
        (text(INDEX_FILE, "[]"), "no weight_map"),
        (index(lambda content: {"weight_map": []}), "no weight_map"),
        (index(lambda content: {"weight_map": {}}), "no weight_map"),
        (renamed("/etc/passwd"), "names the file '/etc/passwd'"),
        (renamed("../hf/model.safetensors"), "only names of files in the folder itself"),
        (renamed(".."), "outside of the folder"),
        (renamed("."), "names the file"),
        (renamed(""), "names the file"),
        (renamed("config.json"), "is no complete safetensors file"),
        (renamed("model-00001-of-00099.safetensors"), "lacks 1 of its weight files"),
        (
            index(lambda content: content["weight_map"].update({"backbone.norm_f.weight": ["a"]})),
            "lacks 1|names the file",
        ),
        (index(lambda content: content["weight_map"].update({"backbone.norm_f.weight": 7})), "lacks 1"),
        (
            index(lambda content: content["weight_map"].update({"x": content["weight_map"]["lm_head.weight"]})),
            "for x in",
        ),
        (moved_away, "is a link to .*elsewhere.*, outside of the folder"),
        (tensors(in_float8), "backbone.norm_f.weight .* is F8_E4M3"),
        (tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(40, dtype=torch.int8)})), "is I8"),
        (tensors(lambda v: v["backbone.norm_f.weight"].fill_(torch.nan)), "40 values that are NaN or infinite"),
        (tensors(lambda v: v["backbone.norm_f.weight"][:1].fill_(-torch.inf)), "1 values that are NaN"),
        (
            tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(39)})),
            r"is \(39,\) in the folder and \(40,\)",
        ),
        (tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(())})), r"is \(\) in the folder"),
        (without_head, "has no lm_head.weight, and config.json has tie_word_embeddings=false"),
        (text("hf_quant_config.json", "{}"), "its weights are quantized"),
        (
            lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"),
            r"tokenizer.json is a link to /etc/passwd",
        ),
        (lambda folder: (folder / "merges.txt").symlink_to(folder / "merges.txt"), "link that leads nowhere"),
    ],
)
def test_files_that_are_wrong_end_in_one_line(
    twins: dict[str, Path], run: Callable[..., str], change: Change, words: str
) -> None:
    line = run(twins["language"], change)
    assert re.search(words, line), line
    assert "root:" not in line


def test_bare_weights_are_checked_too(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from hybridprune_megatron.engine.weights import load_initial_weights, save_weights

    file, name = tmp_path / "w.safetensors", "mlp1.1.weight"
    save_weights(tiny.model, file)
    right = load_file(file)
    for value, words in (
        (right[name] * torch.nan, f"{name} has .* NaN or infinite"),
        (right[name].to(torch.float8_e5m2), f"{name} is float8_e5m2, which needs scales"),
        (right[name].to(torch.int8), f"{name} is int8, which needs scales"),
    ):
        save_file(right | {name: value}, file)
        with pytest.raises(ValueError, match=words):
            load_initial_weights(tiny.model, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config(mlp_hidden_act="gelu"), "mlp_hidden_act=gelu"),
        (renamed("../x.safetensors"), "only names of files"),
        (lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"), "is a link to /etc/passwd"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: None, "do not fit its configuration"),
    ],
)
def test_the_original_of_an_export_as_it_came_is_as_foreign(
    twins: dict[str, Path], run_dir: Path, refused: Refused, tmp_path: Path, change: Change, words: str
) -> None:
    original = Path(shutil.copytree(twins["language"], tmp_path / "hf"))
    change(original)
    arguments = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--plain", str(original)]
    if words.startswith("is a link"):
        # Of the run's own model, or its weights are refused first.
        shutil.rmtree(original)
        script("export_hf").main([*arguments[:3], str(original)])
        change(original)
    assert words in refused(lambda: script("export_hf").main(arguments))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "x", "-inf"])
def test_a_file_size_that_is_none(refused: Refused, twins: dict[str, Path], value: str) -> None:
    main = script("import_hf").main
    assert "--max-shard-gib" in refused(
        lambda: main([str(twins["language"]), "--name", "a", f"--max-shard-gib={value}"])
    )


def test_a_missing_or_strange_folder(refused: Refused, tmp_path: Path) -> None:
    main = script("import_hf").main
    (tmp_path / "file").write_text("x")
    for source in ("nowhere", "file", "a\0b"):
        refused(lambda source=source: main([str(tmp_path / source), "--name", "a", "--out", str(tmp_path / "out")]))


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


def test_a_snapshot_of_the_hub_is_read_through_its_links(twins: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(twins["language"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert values_of(snapshot) == values_of(twins["language"])
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*, outside of the folder"):
        values_of(snapshot)


def test_our_own_export_says_how_its_steps_are_clamped(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from dataclasses import replace

    from hybridprune_megatron.export.write import export_model

    cfg = replace(tiny.cfg, model=replace(tiny.cfg.model, time_step_min=1e-3))
    folder = export_model(tiny.model, cfg, tmp_path / "hf")
    assert values_of(folder)["time_step_min"] == 1e-3
    for change, words in (
        (config(conv_kernel=3), "conv_kernel=3"),
        (config(vision={"hidden_size": "${oc.env:HOME}"}), "vision"),
        (config(vision=[]), "vision"),
        (config("vision", unheard_of=1), "unheard_of"),
        (config(vision=None), "vision|unknown"),
        (config(unheard_of=1), "unheard_of"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        change(copy)
        with pytest.raises(ValueError, match=words) as raised:
            values_of(copy)
        assert "\n" not in str(raised.value)
        shutil.rmtree(copy)


def test_weights_of_a_folder_with_other_settings_are_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from dataclasses import replace

    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.export.write import export_model

    folder = export_model(tiny.model, tiny.cfg, tmp_path / "hf")
    load_initial_weights(tiny.model, folder, tiny.cfg.model)
    vision = replace(tiny.cfg.model.vision, image_mean=[0.1, 0.2, 0.3])
    for changed, words in (
        (replace(tiny.cfg.model, norm_epsilon=1e-6), "norm_epsilon=1e-05, and model.norm_epsilon=1e-06"),
        (replace(tiny.cfg.model, vision=vision), r"vision.image_mean=\[0.48"),
        (replace(tiny.cfg.model, num_query_groups=4), "num_query_groups=2, and model.num_query_groups=4"),
        (replace(tiny.cfg.model, time_step_min=0.1), "never"),
    ):
        if words == "never":
            # No clamp is what a folder without a limit says; the run may know better.
            load_initial_weights(tiny.model, folder, changed)
            continue
        with pytest.raises(ValueError, match=words):
            load_initial_weights(tiny.model, folder, changed)


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
