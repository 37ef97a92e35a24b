"""Every reduction of conf/ goes into a folder's config.json and comes out as the same one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.export.configuration_hybridprune import TRAINING_ONLY, merge_reduction, resolve_reduction
from hybridprune_megatron.method.reduction import Reduction


@pytest.mark.parametrize("option", group_options(CONF_DIR, "reduction"))
def test_settings_survive_the_folder(option: str) -> None:
    cfg = load_config(["experiment=nemotron_nano_12b_v2_vl", f"reduction={option}"])
    pattern = cfg.model.hybrid_pattern
    settings = {name: value for name, value in asdict(cfg.reduction).items() if name not in TRAINING_ONLY}
    saved = resolve_reduction(pattern, settings)
    loaded = resolve_reduction(pattern, json.loads(json.dumps(saved)))
    assert loaded == saved
    trained = Reduction.of(asdict(cfg.reduction), cfg.retention_by_layer)
    assert Reduction.of(loaded, loaded["retention"]) == trained
    # Another budget is solved by the same schedule.
    if cfg.reduction.dt_filter is None:
        given = {"budget": 0.45}
        if cfg.reduction.front != "none" and cfg.reduction.front_retention == cfg.reduction.budget:
            given["front_retention"] = 0.45
        other = resolve_reduction(pattern, merge_reduction(loaded, given))
        assert sum(other["retention"]) / len(other["retention"]) == pytest.approx(0.45)
        assert {name for name in other if other[name] != loaded[name]} <= {*given, "retention"}


@pytest.mark.parametrize("wrong", [[1], "query", 0.5, True])
def test_a_reduction_that_is_no_dictionary_is_refused_in_one_line(wrong) -> None:
    for call in (
        lambda: resolve_reduction("M*", wrong),
        lambda: merge_reduction(wrong, {"budget": 0.5}),
        lambda: merge_reduction({}, wrong),
    ):
        with pytest.raises(ValueError, match="must be a dictionary") as raised:
            call()
        assert "\n" not in str(raised.value)
