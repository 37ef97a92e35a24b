"""``hybridprune evaluate``: the table has what an evaluation of the same questions counts."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from hybridprune_megatron.config.stored_run import checkpoint_config
from scripts.make_demo_data import main as make_demo_data
from tests.tracked import ROOT
from tests.worlds import run_world

WEIGHTS = ROOT / "assets" / "demo" / "base.safetensors"
SAMPLES, ASKED = 8, 6


def _printed(*arguments: str) -> list[str]:
    from hybridprune_megatron.commands.evaluate import main

    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([f"checkpoint={WEIGHTS}", "experiment=demo", f"samples={ASKED}", *arguments])
    return text.getvalue().splitlines()


def _table(data: Path) -> None:
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.evaluation.accuracy import evaluate
    from hybridprune_megatron.evaluation.held_out import chance, load_questions
    from hybridprune_megatron.evaluation.report import percent

    lines = _printed(f"data={data}", "reduction.budget=0.5")
    full_only = _printed(f"data.validation={data}", "reduction=none")

    cfg = checkpoint_config(WEIGHTS, ["experiment=demo", f"data.validation={data}", "reduction.budget=0.5"])
    model = load_model(WEIGHTS, cfg)
    questions = load_questions(cfg, SAMPLES)[:ASKED]
    full, reduced = (evaluate(model, questions, reduction, 1000) for reduction in (None, model.reduction))
    assert lines[0].split() == ["full", "reduced"]
    cells = [percent(each.accuracy) for each in (full, reduced)]
    remark = f"{ASKED} held-out questions, chance {percent(chance(questions))}"
    assert " ".join(lines[1].split()) == f"accuracy {cells[0]} {cells[1]} {remark}"
    assert [line.split()[0] for line in lines[2:-1]] == sorted({question.kind for question in questions})
    kept = f"visual tokens kept 100.0 % {percent(reduced.retention.mean)} mean over layers; budget 0.5"
    assert " ".join(lines[-1].split()) == kept
    assert abs(reduced.retention.mean - 0.5) < 0.02
    assert full_only[0].split() == ["full"]
    assert full_only[1].split()[:2] == lines[1].split()[:2]


def test_the_table_has_what_an_evaluation_counts(tmp_path: Path) -> None:
    make_demo_data(f"--out {tmp_path} --train 0 --validation {SAMPLES} --frames 16 --fps 2 --workers 1".split())
    run_world(1, _table, tmp_path / "validation")
