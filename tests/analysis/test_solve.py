"""Damages of single drops against passes that really drop so, and a solved list from clips to its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from tests.analysis.videos import clip_config, write_clips
from tests.models.tiny import PATTERN, tiny_config, tiny_sample
from tests.worlds import run_world

LEVELS = (0.6, 0.3, 0.0)
LAYERS = [layer for layer, symbol in enumerate(PATTERN) if symbol in "M*"][:-1]


def _damages() -> None:
    from hybridprune_megatron.analysis.damage import answer_logits, divergence, drop_damages
    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.evaluation.forward import measuring
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    model, sample = build_model(tiny_config()).eval(), tiny_sample(1, frames=5)
    found = drop_damages(model, sample, model.reduction, LAYERS, LEVELS)
    assert sorted(found) == LAYERS
    batch, logits = pack([sample]), {}
    for layer in LAYERS:
        for level, damage in zip(LEVELS, found[layer]):
            retention = (1.0,) * (layer + 1) + (level,) * (len(PATTERN) - layer - 1)
            for name, reduction in (("full", None), ("reduced", replace(model.reduction, retention=retention))):
                with measuring(model, reduction):
                    logits[name] = answer_logits(model, batch)
            assert damage == pytest.approx(divergence(logits["full"], logits["reduced"]), rel=1e-4, abs=1e-9)
            assert damage > 0
    assert not model.language_model.decoder._forward_pre_hooks


def test_damages_are_those_of_a_pass_that_drops_so() -> None:
    run_world(1, _damages)


def _solve(folder: Path) -> None:
    from hybridprune_megatron.analysis import solve as module
    from hybridprune_megatron.analysis.settings import SolveSettings
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    cfg = clip_config()
    data = write_clips(folder / "clips", 12, needles=False)
    model = build_model(cfg).eval()
    module.RESAMPLES = 5
    settings = SolveSettings(str(folder), str(folder / "out"), clips=128)
    settings.clips = 12
    first = module.solve(model, cfg, settings, data, {"checkpoint": "a"})
    assert json.loads((folder / "out" / "solved.json").read_text()) == first
    assert first["mean_retention"] <= cfg.reduction.budget
    assert first["retention"][0] == 1.0
    assert first["clips"] == {"solved_from": 6, "checked_on": 6}
    text = module.report(first)
    assert ("keep the configured schedule" in text) != ("Take it with: reduction.budget=" in text)
    # Killed while it wrote the third clip: the rows that are there are not measured again, and the result is the same.
    rows = folder / "out" / "damages.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    rows.write_text("".join(lines[:3]) + lines[3][:20])
    again = module.solve(model, cfg, settings, data, {"checkpoint": "a"})
    assert {**again, "machine": None} == {**first, "machine": None}
    assert rows.read_text() == "".join(lines)
    # A target of operations instead of a budget.
    settings.speedup = 1.1
    assert sum(module.solve(model, cfg, settings, data, {"checkpoint": "a"})["retention"]) > 0
    with pytest.raises(ValueError, match="holds damages of other weights"):
        module.solve(model, cfg, settings, data, {"checkpoint": "b"})


def test_a_list_is_solved_resumed_and_checked(tmp_path: Path) -> None:
    run_world(1, _solve, tmp_path)


def test_nothing_of_somebody_else_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hybridprune_megatron.commands.solve import main

    data = write_clips(tmp_path / "clips", 1, needles=False)
    known = ["checkpoint=assets/demo/base.safetensors", "experiment=demo", f"data={data}", f"out={tmp_path}/out"]
    (tmp_path / "out").mkdir()
    for name in ("damages.jsonl", "solved.json"):
        mine = tmp_path / "out" / name
        mine.write_text("mine")
        with pytest.raises(SystemExit):
            main(known)
        assert f"out={mine} exists and was not written by hybridprune solve" in capsys.readouterr().err
        assert mine.read_text() == "mine"
        mine.unlink()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clips": 64}, "clips=64: must be at least 128"),
        ({"levels": (0.2, 0.5)}, "levels=.*: must fall"),
        ({"damage": "kl"}, "damage=kl: allowed are log, raw"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, keys: dict, message: str) -> None:
    from hybridprune_megatron.analysis.settings import SolveSettings

    with pytest.raises(ConfigError, match=message):
        SolveSettings(str(tmp_path), "out", **keys)
