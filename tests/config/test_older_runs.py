"""A run of version 0.1, whose run.json has flat keys of the reduction, is read and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.config.resume import check_resume
from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint

# As `recipes/finetune.py experiment=demo reduction=evs_query` of version 0.1 wrote it.
FLAT = {
    "budget": 0.25, "scorer": "query", "schedule": "sigmoid", "midpoint": 0.2, "slope": 10.0, "step_layer": 0,
    "stages": None, "floor": None, "retention": None, "layers": "all", "min_tokens": 1, "min_tokens_per_frame": 0,
    "multiple_of": 1, "local_choice": False, "query_rows": "question", "attention_pooling": "mean",
    "attention_causal": True, "mamba_decay": False, "mamba_dt": True, "mamba_function": "identity",
    "mamba_pooling": "mean", "smoothing_frames": 0, "frame_share": 0.0, "seed": 0, "dropped": "discard",
    "front": "evs", "front_retention": 0.5, "dt_filter": None,
}  # fmt: skip
LISTED = [1.0] + [0.5] * 9
# What the default of version 0.1 differs in.
SAME = [
    "reduction=evs_query",
    "reduction.score.mamba_contrast=false",
    "reduction.schedule.floor=null",
    "reduction.select.frame_share=0.0",
]
CASES = {
    "a front": ({}, SAME),
    "every part": (
        {"scorer": "random", "seed": 4, "schedule": "linear", "floor": 0.1, "front": "none", "front_retention": 1.0},
        [
            *("reduction=random", "reduction.score.seed=4", "reduction.schedule=linear"),
            *("reduction.schedule.floor=0.1", "reduction.front.name=none", "reduction.front.retention=1.0"),
        ],
    ),
    "a list": (
        {"retention": LISTED, "budget": 0.55, "front": "none", "front_retention": 1.0},
        [
            *("reduction.budget=0.55", f"reduction.schedule={{name: listed, retention: {LISTED}}}"),
            *SAME[1:2],
            SAME[3],
        ],
    ),
}


def _run(folder: Path, reduction: dict) -> None:
    """A run of the demo that saved one checkpoint."""
    config = plain_config(load_config(["experiment=demo", f"output_dir={folder}"])) | {"reduction": reduction}
    checkpoint = folder / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").write_text("{}")
    (checkpoint / "run.json").write_text(json.dumps({"step": 50, "config": config}))


@pytest.mark.parametrize("case", CASES)
def test_flat_keys_of_a_run_are_read(tmp_path: Path, case: str) -> None:
    flat, overrides = CASES[case]
    _run(tmp_path, FLAT | flat)
    today = load_config(["experiment=demo", f"output_dir={tmp_path}", *overrides])
    assert len(today.retention_by_layer) == len(LISTED)
    read = checkpoint_config(find_checkpoint(tmp_path), [])
    assert read.reduction == today.reduction
    check_resume(today)
    # Another budget, or a list that it would contradict.
    if case == "a list":
        with pytest.raises(ValueError, match="budget"):
            _ = checkpoint_config(find_checkpoint(tmp_path), ["reduction.budget=0.6"]).retention_by_layer
    else:
        assert checkpoint_config(find_checkpoint(tmp_path), ["reduction.budget=0.45"]).reduction.budget == 0.45


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("reduction.score=uniform", "reduction.score.name=uniform"),
        ("reduction.front.retention=0.6", "reduction.front.retention=0.6"),
        ("reduction.schedule.midpoint=0.3", "reduction.schedule.midpoint=0.3"),
        ("reduction.select.min_tokens=2", "reduction.select.min_tokens=2"),
    ],
)
def test_a_run_is_not_continued_under_another_reduction(tmp_path: Path, override: str, key: str) -> None:
    _run(tmp_path, FLAT)
    with pytest.raises(ConfigError, match=f"{key}: .* holds a run with"):
        check_resume(load_config(["experiment=demo", f"output_dir={tmp_path}", *SAME, override]))


def test_a_reduction_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    _run(tmp_path, FLAT | {"scorer": "best"})
    with pytest.raises(ValueError, match=r"reduction\.score=best") as raised:
        checkpoint_config(find_checkpoint(tmp_path), [])
    assert "\n" not in str(raised.value)


def test_a_stored_score_that_lacks_a_later_key_is_read_as_it_was() -> None:
    """Runs of the day between the nested keys and contrast have all other keys of the score."""
    today = ReductionConfig.of({"budget": 0.25}).plain()
    assert today["score"]["mamba_contrast"]
    before = {name: value for name, value in today["score"].items() if name != "mamba_contrast"}
    assert not ReductionConfig.of(today | {"score": before}).score.mamba_contrast
    # What somebody writes names what matters to him, and means today's score.
    for score in ("query", {"name": "query"}, {"name": "query", "mamba_dt": False}):
        assert ReductionConfig.of({"budget": 0.25, "score": score}).score.mamba_contrast


def test_flat_keys_of_saved_runs_are_read() -> None:
    flat = {
        "scorer": "random", "budget": 0.3, "schedule": "step", "midpoint": 0.2, "slope": 10.0, "step_layer": 2,
        "stages": None, "floor": None, "retention": None, "layers": "all", "min_tokens": 2, "min_tokens_per_frame": 0,
        "multiple_of": 4, "local_choice": False, "query_rows": "question", "attention_pooling": "mean",
        "mamba_decay": False, "smoothing_frames": 1, "frame_share": 0.0, "seed": 7, "dropped": "discard",
        "front": "random", "front_retention": 0.5, "dt_filter": None,
    }  # fmt: skip
    read = ReductionConfig.of(flat).plain()
    assert read["score"] == {"name": "random", "seed": 7}
    assert read["schedule"] == {"name": "step", "layer": 2}
    assert read["front"] == {"name": "random", "retention": 0.5, "seed": 7}
    assert (read["select"]["min_tokens"], read["select"]["multiple_of"], read["select"]["smoothing_frames"]) == (
        2,
        4,
        1,
    )
    assert read["budget"] == 0.3
    listed = ReductionConfig.of(flat | {"front": "none", "front_retention": 1.0, "retention": [1.0, 0.5]}).plain()
    assert listed["schedule"] == {"name": "listed", "retention": (1.0, 0.5)}
