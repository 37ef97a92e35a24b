"""Every shipped configuration composes, and the published dimensions add up."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from statistics import fmean

import pytest

from hybridprune_megatron.config import Config, ConfigError, load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.config.files import check_files
from hybridprune_megatron.config.reduction_schema import PARTS
from hybridprune_megatron.config.schema import ModelConfig
from tests.tracked import tracked


def shipped(group: str) -> list[str]:
    """Options of a group; scripts/import_hf.py adds models of its user's."""
    return sorted(path.stem for path in tracked() if path.parent == CONF_DIR / group and path.suffix == ".yaml")


EXPERIMENTS = shipped("experiment")
# Published dimensions: layers M, -, *; attention indices; in_proj rows;
# convolution channels; parameters of the language model with 131072 untied rows.
PUBLISHED = {
    "nemotron_nano_12b_v2_vl": ((28, 28, 6), (7, 16, 25, 34, 43, 52), 22656, 12288, 12_310_001_152),
    "nemotron_nano_9b_v2": ((27, 25, 4), (14, 21, 30, 39), 22656, 12288, 8_888_227_328),
    "nemotron_h_8b": ((24, 24, 4), (7, 18, 29, 40), 18560, 10240, 8_100_852_736),
}


@cache
def experiment(name: str) -> Config:
    """An experiment as it is shipped; composing takes a quarter of a second."""
    return load_config([f"experiment={name}"])


def language_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the language model by the formulas of the layers; independent of any code that builds it."""
    width, inner = model.hidden_size, model.mamba_num_heads * model.mamba_head_dim
    channels = inner + 2 * model.mamba_num_groups * model.mamba_state_dim
    query, key_value = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    per_layer = {
        # in_proj [z x B C dt], convolution of 4 taps with bias, A_log, D, dt_bias, gated norm, out_proj
        "M": width * (inner + channels + model.mamba_num_heads)
        + 5 * channels
        + 3 * model.mamba_num_heads
        + inner
        + inner * width,
        "*": width * (query + 2 * key_value) + query * width,
        "-": 2 * width * model.ffn_hidden_size,
    }
    layers = "".join(model.stages)
    norms = (len(layers) + 1) * width
    return 2 * vocab_size * width + norms + sum(per_layer[symbol] for symbol in layers)


def test_expected_experiments_are_shipped() -> None:
    study = {"bench", "bench_base", "bench_base_clips", "bench_base_dense"}
    assert {"demo", "demo_base", "demo_base_clips", "twin", *study, "nemotron_3_nano_30b_a3b", *PUBLISHED} == set(
        EXPERIMENTS
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name: str) -> None:
    cfg = experiment(name)
    assert isinstance(cfg, Config)
    assert cfg.name == ("demo_by_hand" if name == "demo" else name)
    assert cfg.output_dir == f"runs/{cfg.name}"
    assert cfg.exp_manager["explicit_log_dir"] == cfg.output_dir
    assert len(cfg.retention_by_layer) == cfg.model.num_layers
    assert sum(cfg.retention_by_layer) / cfg.model.num_layers == pytest.approx(cfg.reduction.budget, abs=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dimensions(name: str) -> None:
    model = experiment(name).model
    counts, attention, in_proj, channels, parameters = PUBLISHED[name]
    layers = "".join(model.stages)
    assert tuple(layers.count(symbol) for symbol in "M-*") == counts
    assert tuple(index for index, symbol in enumerate(layers) if symbol == "*") == attention
    inner = model.mamba_num_heads * model.mamba_head_dim
    states = 2 * model.mamba_num_groups * model.mamba_state_dim
    assert (2 * inner + states + model.mamba_num_heads, inner + states) == (in_proj, channels)
    assert language_parameters(model, vocab_size=131072) == parameters


def test_video_model_makes_256_tokens_of_a_frame() -> None:
    cfg = experiment("nemotron_nano_12b_v2_vl")
    assert cfg.model.vision is not None
    assert cfg.model.vision.tokens_per_frame == 256
    assert cfg.model.vocab_size == 132096
    assert cfg.parallel.model_parallel_size == 8
    assert (cfg.data_parallel_size, cfg.num_micro_batches) == (4, 4)


def test_demo_is_complete() -> None:
    cfg = experiment("demo")
    assert cfg.model.vision is not None
    assert cfg.model.vision.tokens_per_frame * cfg.data.num_frames == 256
    assert cfg.model.init_checkpoint == "assets/demo/base.safetensors"
    assert cfg.reduction.budget == 0.25
    assert not cfg.model.trainable.vision
    base = experiment("demo_base")
    assert base.model.init_checkpoint is None
    assert base.reduction.budget == 1.0
    assert base.model.trainable.vision
    assert replace(base.model, init_checkpoint=cfg.model.init_checkpoint, trainable=cfg.model.trainable) == cfg.model


def test_every_model_and_data_option_is_part_of_an_experiment() -> None:
    """So that ``test_experiment_composes`` covers them."""
    texts = [(CONF_DIR / "experiment" / f"{name}.yaml").read_text(encoding="ascii") for name in EXPERIMENTS]
    for group in ("model", "data"):
        # tests/parallel/test_experts.py composes and trains the other.
        for option in {*shipped(group)} - {"demo_experts"}:
            assert any(f"override /{group}: {option}\n" in text for text in texts), (group, option)


@cache
def with_reduction(option: str) -> Config:
    # Of the demo's ten layers some options reach too few at a budget of 0.25.
    return load_config(["experiment=nemotron_nano_12b_v2_vl", f"reduction={option}"])


@pytest.mark.parametrize("option", group_options(CONF_DIR, "reduction"))
def test_reduction_option_composes(option: str) -> None:
    cfg = with_reduction(option)
    assert cfg.reduction.budget == (1.0 if option in ("none", "longmamba") else 0.25)
    assert fmean(cfg.retention_by_layer) == pytest.approx(cfg.reduction.budget, abs=1e-9)


def test_no_two_reduction_options_say_the_same() -> None:
    said = {option: with_reduction(option).reduction.plain() for option in group_options(CONF_DIR, "reduction")}
    assert [pair for pair in combinations(said, 2) if said[pair[0]] == said[pair[1]]] == []


@pytest.mark.parametrize("option", group_options(CONF_DIR, "parallel"))
def test_parallel_option_composes(option: str) -> None:
    overrides = [f"parallel={option}", "trainer.devices=32", "trainer.global_batch_size=32"]
    if option.startswith("tp8"):
        overrides += ["model=nemotron_nano_12b_v2_vl", "data=video_sft"]
    if option == "tp2_ep8":
        overrides += ["model=demo_experts"]
    if option == "pp2":
        overrides += ["model.hybrid_pattern=M-M*-|M-M*-"]
    cfg = load_config(overrides)
    assert cfg.data_parallel_size * cfg.parallel.model_parallel_size == 32


@pytest.mark.parametrize("option", group_options(CONF_DIR, "trainer"))
def test_trainer_option_composes(option: str) -> None:
    cfg = load_config([f"trainer={option}", "trainer.global_batch_size=32"])
    assert cfg.num_micro_batches * cfg.data_parallel_size == 32


def test_overrides_reach_the_config() -> None:
    cfg = load_config(["experiment=demo", "reduction.budget=0.35", "trainer.max_steps=50", "name=other"])
    assert (cfg.reduction.budget, cfg.trainer.max_steps) == (0.35, 50)
    assert cfg.exp_manager["explicit_log_dir"] == "runs/other"


def test_explicit_retention_replaces_the_schedule() -> None:
    shares = [1.0, 0.5, 0.5, 0.25, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    cfg = load_config([f"reduction.schedule={{name: listed, retention: {shares}}}", "reduction.budget=0.265"])
    assert cfg.retention_by_layer == tuple(shares)


def test_layers_may_be_a_list() -> None:
    cfg = load_config(["reduction.layers=[0,3]"])
    assert cfg.reduction.layers == [0, 3]
    falls = [i for i in range(1, 10) if cfg.retention_by_layer[i] < cfg.retention_by_layer[i - 1]]
    assert falls == [1, 4]


def test_every_score_schedule_and_front_has_an_option() -> None:
    said = [with_reduction(option).reduction for option in group_options(CONF_DIR, "reduction")]
    for part, registry in PARTS.items():
        # A list of shares is for one pattern.
        assert {getattr(each, part).name for each in said} == {*registry.names} - {"listed", "random", "uniform"} | (
            {"random", "uniform"} if part == "score" else set()
        )


def test_checkpoint_and_data_must_exist(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").touch()
    (tmp_path / "train" / ".nv-meta").mkdir(parents=True)
    paths = ["data.train=train", "data.validation=null", "data.tokenizer=tokenizer"]
    check_files(load_config(paths))
    weights = [*paths, "model.init_checkpoint=base.safetensors"]
    with pytest.raises(ConfigError, match=r"^model.init_checkpoint=base.safetensors: is not there .*random weights"):
        check_files(load_config(weights))
    with pytest.raises(ConfigError, match=r"^data.tokenizer=gone: is not there"):
        check_files(load_config([*paths, "data.tokenizer=gone"]))
    with pytest.raises(ConfigError, match=r"^data.train=None: a run needs data; set data.train"):
        check_files(load_config(["data.train=null"]))
