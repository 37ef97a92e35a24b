"""Every reduction of conf/ goes into a folder's config.json and comes out as the same one."""

from __future__ import annotations

import json

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.explain import group_options
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.export.configuration_hybridprune import (
    exported_settings,
    merge_reduction,
    resolve_reduction,
)


@pytest.mark.parametrize("option", group_options(CONF_DIR, "reduction"))
def test_settings_survive_the_folder(option: str) -> None:
    cfg = load_config(["experiment=nemotron_nano_12b_v2_vl", f"reduction={option}"])
    pattern = cfg.model.hybrid_pattern
    saved = resolve_reduction(pattern, exported_settings(cfg.reduction))
    loaded = resolve_reduction(pattern, json.loads(json.dumps(saved)))
    assert loaded == saved
    settings, retention = {**loaded}, tuple(loaded["retention"])
    del settings["retention"]
    read = ReductionConfig.of(settings)
    assert read.policy(pattern, retention=retention) == cfg.reduction.policy(pattern)
    # And without the solved shares, which the settings give again.
    assert retention == cfg.retention_by_layer == read.retention(pattern)
    # Another budget is solved by the same schedule.
    if cfg.reduction.dt_filter is None:
        given = {"budget": 0.45}
        front = cfg.reduction.front
        if front.name != "none" and front.retention == cfg.reduction.budget:
            given["front"] = {"retention": 0.45}
        other = resolve_reduction(pattern, merge_reduction(loaded, given))
        assert sum(other["retention"]) / len(other["retention"]) == pytest.approx(0.45)
        assert {name for name in other if other[name] != loaded[name]} <= {*given, "retention"}
        assert {**other["front"], "retention": None} == {**loaded["front"], "retention": None}


# As version 0.1 wrote it into every config.json: the keys of all scores and schedules, chosen or not.
_FLAT = {
    "scorer": "query", "budget": 0.5, "schedule": "sigmoid", "midpoint": 0.2, "slope": 10.0, "step_layer": 0,
    "stages": None, "floor": None, "retention": [1.0, 0.5875570250071946, 0.3170119789603664, 0.3170119789603664,
    0.2784190170720724], "layers": "all", "min_tokens": 1, "min_tokens_per_frame": 0, "query_rows": "question",
    "attention_pooling": "mean", "attention_causal": True, "mamba_decay": False, "mamba_dt": True,
    "mamba_function": "identity", "mamba_pooling": "mean", "smoothing_frames": 0, "frame_share": 0.0, "seed": 0,
    "dropped": "discard", "front": "none", "front_retention": 1.0, "dt_filter": None,
}  # fmt: skip
_CHANGED = {
    "query": {"mamba_pooling": "max_heads", "frame_share": 0.25, "dropped": "merge"},
    "random, step": {"scorer": "random", "seed": 3, "schedule": "step", "step_layer": 1, "budget": 0.6,
                     "retention": [1.0, 1.0, 1 / 3, 1 / 3, 1 / 3]},
    "front": {"front": "random", "front_retention": 0.6, "seed": 5, "budget": 0.3,
              "retention": [0.6, 0.3525342150043168, 0.19020718737621986, 0.19020718737621986, 0.1670514102432434]},
}  # fmt: skip
_SIGNED = {"name": "query", "mamba_contrast": False}
_NO_FLOOR = {"name": "sigmoid", "floor": None}
_NESTED = {
    "query": {
        "budget": 0.5,
        "score": _SIGNED | {"mamba_pooling": "max_heads"},
        "schedule": _NO_FLOOR,
        "select": {"frame_share": 0.25, "dropped": "merge"},
    },
    "random, step": {
        "budget": 0.6,
        "score": {"name": "random", "seed": 3},
        "schedule": {"name": "step", "layer": 1},
    },
    "front": {
        "budget": 0.3,
        "score": _SIGNED,
        "schedule": _NO_FLOOR,
        "front": {"name": "random", "retention": 0.6, "seed": 5},
    },
}


@pytest.mark.parametrize("case", _CHANGED)
def test_a_folder_of_version_0_1_is_read(case: str) -> None:
    pattern, saved = "M*-M*", _FLAT | _CHANGED[case]
    settings = exported_settings(ReductionConfig.of(_NESTED[case]))
    found, wanted = (resolve_reduction(pattern, given) for given in (saved, settings))
    assert found.pop("retention") == saved["retention"] == pytest.approx(wanted.pop("retention"), abs=1e-12)
    assert found == wanted
    # Any of its settings may be replaced, by their name then or today.
    changes = (
        ({"budget": 0.55 if "front" not in case else 0.35}, {}),
        ({"min_tokens": 2}, {"select": {"min_tokens": 2}}),
        ({"layers": "attention", "budget": 0.9, "front": "none", "front_retention": 1.0}, {"front": "none"}),
    )
    for then, today in changes:
        today = {name: value for name, value in then.items() if name in ("budget", "layers")} | today
        found, wanted = (resolve_reduction(pattern, merge_reduction(saved, given)) for given in (then, today))
        assert found == wanted
        nested = _NESTED[case] | {name: value for name, value in today.items() if name != "select"}
        nested["select"] = nested.get("select", {}) | today.get("select", {})
        wanted = resolve_reduction(pattern, exported_settings(ReductionConfig.of(nested)))
        assert found.pop("retention") == pytest.approx(wanted.pop("retention"), abs=1e-12)
        assert found == wanted


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
