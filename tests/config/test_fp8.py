"""The fp8 group: its options compose, and what cannot run in FP8 is refused in one line before torch is there."""

from __future__ import annotations

import re

import pytest

from hybridprune_megatron.config import ConfigError, load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.config.fp8_schema import TILE, Fp8Config

TWELVE = ("experiment=nemotron_nano_12b_v2_vl", "data.train=x", "data.tokenizer=y")
THIRTY = ("experiment=nemotron_3_nano_30b_a3b", "data.train=x", "data.tokenizer=y")
ALONE = ("parallel=single", "trainer.num_nodes=1", "trainer.devices=1")


def test_every_option_is_a_recipe_of_that_name() -> None:
    options = set(group_options(CONF_DIR, "fp8"))
    assert options == {"none", *TILE}
    for option in options:
        fp8 = load_config([*TWELVE, *ALONE, f"fp8={option}"]).fp8
        assert fp8.recipe == (None if option == "none" else option)
        assert fp8.first_last_layers_bf16 == (option != "delayed")
        # The block recipes keep gradients in e4m3 too: their scales are of few numbers.
        assert fp8.format == ("e4m3" if option in ("blockwise", "mxfp8") else "hybrid")
    assert load_config([*TWELVE]).fp8 == Fp8Config()


def test_first_and_last_layers() -> None:
    fp8 = Fp8Config("tensorwise", num_layers_at_start_in_bf16=2)
    assert [layer for layer in range(8) if not fp8.quantizes(layer, 8)] == [0, 1, 7]
    assert all(Fp8Config("delayed", first_last_layers_bf16=False).quantizes(layer, 8) for layer in range(8))
    assert not any(Fp8Config().quantizes(layer, 8) for layer in range(8))


@pytest.mark.parametrize(
    ("overrides", "multiple"),
    [
        ([*ALONE, "fp8=none"], 1),
        ([*ALONE, "fp8=tensorwise"], 16),
        ([*ALONE, "fp8=blockwise"], 128),
        ([*ALONE, "fp8=mxfp8", "reduction.select.multiple_of=48"], 96),
        # Ranks that share a sequence have whole tiles each.
        (["fp8=none"], 8),
        (["fp8=tensorwise"], 128),
        (["parallel=tp8_cp4", "fp8=none"], 64),
        (["parallel=tp8_cp4", "fp8=tensorwise"], 512),
        # Every tensor-parallel rank has all tokens.
        (["parallel.sequence_parallel=false", "fp8=tensorwise"], 16),
    ],
)
def test_packed_lengths_divide_by(overrides: list[str], multiple: int) -> None:
    assert load_config([*TWELVE, *overrides]).length_multiple == multiple


REFUSED = {
    "unknown recipe": ([*TWELVE, "fp8.recipe=blocks"], r"fp8.recipe=blocks: allowed are tensorwise, .*"),
    "format": ([*TWELVE, "fp8=tensorwise", "fp8.format=e5m2"], r"fp8.format=e5m2: allowed are hybrid, e4m3; .*"),
    "ends and delayed": (
        [*TWELVE, "fp8.recipe=delayed"],
        r"fp8.first_last_layers_bf16=True: fp8.recipe=delayed updates .*; set fp8=delayed .*",
    ),
    "precision": (
        ["experiment=demo", "fp8=tensorwise"],
        r"trainer.precision=fp32: fp8.recipe=tensorwise .*; set trainer.precision=bf16 or fp8=none",
    ),
    "plain torch": (
        [*TWELVE, "fp8=tensorwise", "model.spec=torch"],
        r"model.spec=torch: plain torch has no FP8.*; set model.spec=te or fp8=none",
    ),
    "more than a stage": (
        [*TWELVE, "fp8=tensorwise", "fp8.num_layers_at_start_in_bf16=63"],
        r"fp8.num_layers_at_start_in_bf16=63: must not exceed the 62 layers of a pipeline stage; .*",
    ),
    "no layer left": (
        [*TWELVE, "fp8=tensorwise", "fp8.num_layers_at_start_in_bf16=31", "fp8.num_layers_at_end_in_bf16=31"],
        r"fp8.num_layers_at_start_in_bf16=31: leaves none of the 62 layers .*; lower either, or set fp8=none",
    ),
    "in_proj of a rank": (
        [*TWELVE, "fp8=mxfp8"],
        r"model.mamba_\* \(rows of in_proj\)=22656 / parallel.tensor=8 = 2832: must be a multiple of 32 for "
        r"fp8.recipe=mxfp8; set fp8=tensorwise \(16\) or lower parallel.tensor",
    ),
    "in_proj of the demo": (
        ["experiment=demo", "fp8=tensorwise", "trainer.precision=bf16"],
        r"model.mamba_\* \(rows of in_proj\)=648: must be a multiple of 16 for fp8.recipe=tensorwise; set fp8=none",
    ),
    "ffn": (
        [*TWELVE, *ALONE, "fp8=tensorwise", "model.ffn_hidden_size=20488"],
        r"model.ffn_hidden_size=20488: must be a multiple of 16 .*",
    ),
    "qkv": (
        [*TWELVE, *ALONE, "fp8=blockwise", "model.kv_channels=120"],
        r"model.num_attention_heads\*kv_channels \(columns of linear_proj\)=4800: must be a multiple of 128 .*",
    ),
    "expert": (
        [*THIRTY, *ALONE, "fp8=tensorwise", "model.experts.ffn_hidden_size=1800"],
        r"model.experts.ffn_hidden_size=1800: must be a multiple of 16 .*",
    ),
    "sequence": (
        [*TWELVE, "parallel=tp8_cp4", "fp8=tensorwise", "data.sequence_length=448", "data.max_frames=1"],
        r"data.sequence_length=448: a packed sequence divides by 512 .*; raise data.sequence_length to at least 512",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    overrides, line = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        load_config(overrides)
    assert re.fullmatch(line, str(error.value)), str(error.value)


def test_a_linear_that_stays_in_bf16_may_have_any_width() -> None:
    # Its only attention layer is the first one; it has 3 heads here.
    overrides = ["model.hybrid_pattern='*M-M'", "model.num_attention_heads=3", "model.num_query_groups=1"]
    overrides += ["model.kv_channels=12", "model.mamba_num_heads=16"]
    cfg = ["experiment=demo", "trainer.precision=bf16", "fp8=tensorwise", *overrides]
    assert load_config(cfg).fp8.recipe == "tensorwise"
    with pytest.raises(ConfigError, match="linear_proj"):
        load_config([*cfg, "fp8.num_layers_at_start_in_bf16=0"])
