"""A score that this project does not know is in the export and has a cost in the plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridprune_megatron.config import compose, load_config
from hybridprune_megatron.cost.plan import make_plan
from hybridprune_megatron.cost.target import TargetConfig
from hybridprune_megatron.export.write import export_model
from studies.demo.parity import max_logit_difference
from tests import stranger
from tests.export.conftest import make_config, make_model
from tests.export.test_measured_parity import samples_of


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    stranger.write(tmp_path)
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_scores", None)


def test_the_export_takes_it_along(
    mine: Path, tokenizer_dir: Path, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reduction = load_config(["experiment=demo", "reduction=mine"]).reduction
    cfg = replace(make_config(tokenizer_dir), reduction=reduction)
    model = make_model(cfg)
    folder = export_model(model, cfg, mine / "hf")
    # Whoever has the folder does not have the file that the score came from.
    del sys.modules["my_scores"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(mine)])
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert exported.config.reduction["score"] == {"name": "my_scores.KeyNorm", "power": 2.0}
    assert max_logit_difference(model, exported, samples_of(inputs)) < 1e-4
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, reduction={"score": "uniform"}).eval()
    with pytest.raises(ValueError, match="keep different tokens"):
        max_logit_difference(model, other, samples_of(inputs))


def test_the_plan_counts_it(mine: Path) -> None:
    plan = make_plan(load_config(["experiment=demo", "reduction=mine"]), TargetConfig())
    rows = plan.prefill.rows
    assert {row.symbol for row in rows if "score" in row.scoring} == {"*"}
    assert all(row.scoring["score"].bytes > 0 for row in rows if "score" in row.scoring)
