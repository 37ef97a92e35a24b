"""A score from somebody else's file: chosen by its dotted path, with keys of its own that are checked as ours are."""

from __future__ import annotations

import json
import shutil

import pytest

from hybridprune_megatron.config import ConfigError, compose, load_config
from hybridprune_megatron.config.checkpoint_folder import saved_config
from hybridprune_megatron.config.compose import CONF_DIR, change_config
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.export.configuration_hybridprune import merge_reduction, resolve_reduction

MINE = """
from dataclasses import dataclass

from hybridprune_megatron.method.scorer import Scorer


@dataclass(frozen=True)
class Mine(Scorer):
    weight: float = 1.0

    def attention(self, block):
        return self.weight * block.k.float().norm(dim=-1)
"""


def test_a_score_of_somebody_elses_is_one_file_and_one_option(tmp_path, monkeypatch) -> None:
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    option = "defaults:\n  - attention_only\n  - _self_\nbudget: 0.5\nscore:\n  name: their_scores.Mine\n"
    (tmp_path / "conf/reduction/mine.yaml").write_text(option)
    (tmp_path / "their_scores.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    reduction = load_config(["reduction=mine", "reduction.score.weight=3"]).reduction
    assert reduction.plain()["score"] == {"name": "their_scores.Mine", "weight": 3.0}
    assert ReductionConfig.of(reduction.plain()) == reduction
    for overrides, line in (
        (["reduction.score.weight=heavy"], r"reduction.score.weight=heavy: must be a number; .*"),
        (["reduction.score.wieght=1"], r"reduction.score.wieght=1: .* has the keys weight; did you mean .*weight\?"),
        (
            ["reduction.layers=all"],
            r"reduction.layers=all: layer 0 is to drop, and .* has no formula for mamba layers.*",
        ),
    ):
        with pytest.raises(ConfigError, match=line):
            load_config(["reduction=mine", *overrides])


@pytest.mark.parametrize("reduction", [{"score": {"name": "stranger.Bomb"}}, {"scorer": "stranger.Bomb"}], ids=str)
def test_a_stored_file_imports_nothing(tmp_path, monkeypatch, reduction) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "stranger.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    stored = plain_config(load_config(["experiment=demo"])) | {"reduction": {"budget": 0.25, **reduction}}
    (tmp_path / "run.json").write_text(json.dumps({"config": stored}))
    line = r"reduction.score=stranger.Bomb: .* import nothing; if you trust it, name it on the command line: .*Bomb$"
    with pytest.raises(ConfigError, match=line):
        change_config(saved_config(tmp_path))
    with pytest.raises(ConfigError, match=line):
        resolve_reduction("M*M*", stored["reduction"])
    with pytest.raises(ConfigError, match=line):
        merge_reduction(stored["reduction"] | {"scorer": "stranger.Bomb", "floor": None}, {"budget": 0.5})
    assert not mark.exists()


def test_a_stored_score_is_imported_once_the_command_line_names_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "scores_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    stored = plain_config(load_config(["experiment=demo", "reduction=attention_only", "reduction.budget=0.5"]))
    stored["reduction"]["score"] = {"name": "scores_of_mine.Mine", "weight": 2.0}
    with pytest.raises(ConfigError, match="import nothing"):
        change_config(stored)
    changed = change_config(stored, ["reduction.score=scores_of_mine.Mine"])
    assert changed.reduction.plain()["score"] == {"name": "scores_of_mine.Mine", "weight": 1.0}
    assert change_config(stored).reduction.plain()["score"]["weight"] == 2.0
