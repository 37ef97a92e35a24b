"""A whole analysis of a tiny model: the files, the sections, the values, and a probe that finds what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.videos import clip_config, write_clips
from tests.worlds import run_world

CLIPS = 40


def _analyze(folder: Path, needles: bool, *overrides: str) -> dict[str, Any]:
    from hybridprune_megatron.analysis.run import analyze
    from hybridprune_megatron.analysis.settings import AnalysisSettings
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    cfg = clip_config(*overrides)
    data = write_clips(folder / "clips", CLIPS if needles else 20, needles)
    settings = AnalysisSettings(str(folder), samples=6, strips=2, exposure_samples=3, probe_samples=CLIPS)
    analyze(build_model(cfg).eval(), cfg, settings, data, folder / "out")
    return json.loads((folder / "out" / "analysis.json").read_text())


def keys(values: Any) -> Any:
    """The shape of JSON: names of dictionaries, and of a list its first element's."""
    if isinstance(values, dict):
        return {name: keys(value) for name, value in values.items()}
    return [keys(values[0])] if isinstance(values, list) and values else type(values).__name__


PAIR = {"spearman": "float", "overlap": "float", "pairs": "int"}
PROBED = {
    "rows": [
        {
            "dropped_after": "NoneType", "layer": "int", "type": "str", "score": "float", "shuffled": "float",
            "shuffled_high": "float", "by_time": ["float"],
        }
    ],
    "by_drop": {
        kind: [{"dropped_after": "int", "score": "float", "held": "float", "absent": "float", "layers": "int"}]
        for kind in ("attention", "mamba")
    },
}  # fmt: skip
#: What other programs may rely on.
SCHEMA = {
    "run": {
        "checkpoint": "str", "data": "str", "samples": "int", "visual_tokens_per_sample": "float", "layers": "str",
        "scorer": "str", "budget": "float", "retention_by_layer": ["float"], "date": "str", "device": "str",
        "torch": "str", "seconds": "float",
    },
    "sparsity": [
        {
            "layer": "int", "type": "str", "tokens_that_hold": {"0.5": "float", "0.8": "float", "0.95": "float"},
            "gini": "float", "negative": "float", "auc": "float",
        }
    ],
    "stability": {
        "layers": ["int"], "top": "float", "spearman": [["float"]], "overlap": [["float"]],
        "by_type": {"attention-mamba": PAIR, "mamba-mamba": PAIR},
        "by_distance": {name: [{"distance": "int"} | PAIR] for name in ("attention-mamba", "mamba-mamba")},
    },
    "kept": {
        "by_layer_and_frame": [["float"]],
        "needed_frames": {"samples": "int", "inside": ["float"], "outside": ["float"]},
    },
    "exposure": [{"layer": "int", "type": "str", "kl": "float", "median": "float"}],
    "probe": {
        "label": "str", "question": "NoneType", "samples": "int", "classes": ["str"],
        "time_bins": [{"frames": ["int"], "samples": "int"}],
        "contents": {"feature": PROBED, "label": PROBED},
    },
    "clips": [
        {
            "key": "str", "half": {"attention": "float", "mamba": "float"},
            "auc": {"attention": "float", "mamba": "float"}, "inside": "float", "outside": "float", "kept": "float",
        }
    ],
    "strips": ["str"],
}  # fmt: skip


def _with_needles(folder: Path) -> None:
    from hybridprune_megatron.analysis.report import SECTIONS

    result = _analyze(folder, True)
    assert keys(result) == SCHEMA
    assert result["run"]["layers"] == "M-M*M-"
    assert result["run"]["visual_tokens_per_sample"] == 32
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {
        "analysis.json", "report.html", "sparsity.png", "stability.png", "kept.png", "exposure.png", "probe.png",
        "strip_0.png", "strip_1.png",
    }  # fmt: skip
    page = (folder / "out" / "report.html").read_text()
    assert [name for name in SECTIONS if f'<h2 id="{name}">' in page] == list(SECTIONS)
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 7
    assert "href=" not in page
    assert page.index('id="conclusion"') < page.index('id="sparsity"')

    # Two of eight frames show the needle: shares inside and outside add up to what the schedule keeps.
    hit = result["kept"]["needed_frames"]
    shares = [(2 * inside + 6 * outside) / 8 for inside, outside in zip(hit["inside"], hit["outside"])]
    assert shares == pytest.approx([sum(row) / 8 for row in result["kept"]["by_layer_and_frame"]])
    assert shares == pytest.approx(result["run"]["retention_by_layer"], abs=1 / 32)

    probe = result["probe"]
    assert probe["samples"] == CLIPS
    assert probe["classes"] == ["blue", "red"]
    assert sum(group["samples"] for group in probe["time_bins"]) == CLIPS
    rows = {(row["dropped_after"], row["layer"]): row for row in probe["contents"]["label"]["rows"]}
    assert set(rows) == {(after, layer) for after in (None, -1, 0, 2, 3) for layer in (0, 2, 3, 4)
                         if after is None or layer > after}  # fmt: skip
    # The first layer's state has the colour, unless the needle's frames never entered; then only noise is there.
    assert rows[None, 0]["score"] > 0.9
    assert rows[-1, 0]["score"] < 0.75
    features = {(row["dropped_after"], row["layer"]): row for row in probe["contents"]["feature"]["rows"]}
    assert features[None, 0]["score"] > 0.5
    assert features[-1, 0]["score"] <= features[-1, 0]["shuffled_high"] + 0.1


def test_a_report_has_every_section_and_the_probe_finds_what_is_there(tmp_path):
    run_world(1, _with_needles, tmp_path, timeout=500)


def _without_needles(folder: Path) -> None:
    result = _analyze(folder, False)
    assert result["kept"]["needed_frames"] is None
    assert result["probe"]["classes"] == []
    assert list(result["probe"]["contents"]) == ["feature"]
    # The second quarter of eight frames, four frames before the last.
    assert result["probe"]["time_bins"] == [{"frames": [4, 4], "samples": 20}]


def test_data_that_knows_of_no_needles_is_analysed_too(tmp_path):
    run_world(1, _without_needles, tmp_path, timeout=500)


def _refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reduction.budget=1: nothing is dropped"):
        _analyze(folder / "full", True, "reduction.budget=1.0")
    with pytest.raises(ValueError, match=r"reduction.score=utrc: .*; set e.g. reduction.score=query"):
        _analyze(folder / "output", True, "reduction.score=utrc", "reduction.select.frame_share=0")


def test_what_cannot_be_analysed_is_said_in_one_line(tmp_path):
    run_world(1, _refusals, tmp_path)
