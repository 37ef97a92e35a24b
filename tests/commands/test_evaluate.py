"""``hybridprune evaluate``: its figures are the demo's, and those of a checkpoint and its export are the same."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.stored_run import checkpoint_config
from hybridprune_megatron.data.shards import ShardWriter
from scripts.make_demo_data import main as make_demo_data
from tests.tracked import ROOT
from tests.worlds import run_world

WEIGHTS = ROOT / "assets" / "demo" / "base.safetensors"
SAMPLES, ASKED = 8, 6
_DEMO = [f"checkpoint={WEIGHTS}", "experiment=demo", "data=tests"]
SAID = {"role": "assistant", "content": "It is red."}


def _printed(*arguments: str) -> list[str]:
    from hybridprune_megatron.commands.evaluate import main

    with contextlib.redirect_stdout(io.StringIO()) as text:
        main(list(arguments))
    return text.getvalue().splitlines()


def _report(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Columns, predictions, and all of evaluation.json."""
    report = json.loads((out / "evaluation.json").read_text())
    return report["columns"], [json.loads(line) for line in (out / "predictions.jsonl").open()], report


def _evaluate(data: Path, out: Path) -> None:
    import torch

    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.data.sample_encoder import SampleEncoder
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.evaluation.accuracy import evaluate
    from hybridprune_megatron.evaluation.forward import measuring
    from hybridprune_megatron.evaluation.held_out import chance, load_questions, read_clips
    from hybridprune_megatron.evaluation.report import percent
    from hybridprune_megatron.export.write import export_model

    bare = [f"checkpoint={WEIGHTS}", "experiment=demo", f"samples={ASKED}", f"data={data}"]
    lines = _printed(*bare, "reduction.budget=0.5", f"out={out / 'checkpoint'}", "batch_size=4")

    # As the demo evaluates: the training model on packed samples with their answers.
    cfg = checkpoint_config(WEIGHTS, ["experiment=demo", f"data.validation={data}", "reduction.budget=0.5"])
    model = load_model(WEIGHTS, cfg)
    questions = load_questions(cfg, SAMPLES)[:ASKED]
    found = [evaluate(model, questions, reduction, 1000) for reduction in (None, model.reduction)]
    columns, rows, _ = _report(out / "checkpoint")
    assert [column["name"] for column in columns] == ["full", "reduced"]
    for wanted, column, budget in zip(found, columns, (1.0, 0.5)):
        assert column["exact"]["all"]["mean"] == pytest.approx(wanted.accuracy)
        assert {kind: each["mean"] for kind, each in column["exact"]["by_kind"].items()} == wanted.by_kind
        assert column["retention"]["by_layer"] == pytest.approx(wanted.retention.by_layer)
        assert {row["key"]: row["correct"] for row in rows if row["budget"] == budget} == wanted.correct
        with measuring(model, None if budget == 1 else model.reduction), torch.no_grad():
            losses, _ = model(pack([question.sample for question in questions]), judged=True)
        assert column["loss"]["mean"] == pytest.approx(float(losses.mean()), rel=1e-4)
        assert column["chance"] == pytest.approx(chance(questions))
    assert found[0].correct != found[1].correct
    # The likeliest choice is that of whose sample the training model is least surprised.
    clip, encoder = next(read_clips(data)), SampleEncoder(cfg)
    surprises = {}
    for choice in clip.choices:
        messages = [clip.messages[0], {"role": "assistant", "content": choice}]
        with measuring(model, model.reduction), torch.no_grad():
            surprises[choice] = float(model(pack(encoder.encode("one", messages, [clip.video]))).sum())
    assert [row["choice"] for row in rows if row["key"] == clip.key][1] == min(surprises, key=surprises.__getitem__)

    assert lines[0].split() == ["full", "reduced"]
    cells = " ".join(percent(each.accuracy) for each in found)
    assert " ".join(lines[1].split()) == f"exact match {cells} {ASKED} questions, chance {percent(chance(questions))}"
    kinds = sorted({question.kind for question in questions})
    assert [line.split()[0] for line in lines[3 : 3 + len(kinds)]] == kinds
    kept = f"visual tokens kept 100.0 % {percent(found[1].retention.mean)} mean over layers; budget 0.5"
    assert " ".join(lines[-2].split()) == kept
    assert lines[-1].endswith("predictions.jsonl, evaluation.json, table.txt, evaluation.png")
    assert (out / "checkpoint" / "table.txt").read_text().splitlines() == lines[:-1]

    export_model(model, cfg, out / "hf")
    _evaluate_export(data, out, rows)
    _evaluate_any(out)
    _compare_methods(out, data)


def _evaluate_export(data: Path, out: Path, rows: list[dict[str, Any]]) -> None:
    """At three budgets and in other batches; rows: predictions of the checkpoint at two of them."""
    budgets = ["budgets=[1,0.5,0.25]", f"out={out / 'export'}", "batch_size=5"]
    lines = _printed(f"checkpoint={out / 'hf'}", f"data={data}", f"samples={ASKED}", *budgets)
    assert lines[0].split() == ["budget", "1", "0.5", "0.25"]
    columns, exported, _ = _report(out / "export")
    assert [column["budget"] for column in columns] == [1.0, 0.5, 0.25]
    assert len(exported) == 3 * ASKED
    for ours, theirs in zip(rows, exported):
        assert {ours.pop("column"), theirs.pop("column")} in ({"full", "1"}, {"reduced", "0.5"})
        assert theirs.pop("loss") == pytest.approx(ours.pop("loss"), rel=1e-3, abs=1e-5)
        assert theirs == ours
    # An earlier evaluation is replaced, anything else is not.
    (out / "export" / "note.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        _printed(f"checkpoint={out / 'hf'}", f"data={data}", f"samples={ASKED}", *budgets)


def _evaluate_any(out: Path) -> None:
    """Samples of any data set, some of which nobody can answer."""
    lines = _printed(f"checkpoint={out / 'hf'}", f"data={out / 'any'}", "budgets=0.5", f"out={out / 'any_out'}")
    columns, rows, report = _report(out / "any_out")
    assert report["left_out"] == {"malformed": 3, "video": 1}
    assert lines[-6] == "4 samples left out (3 malformed, 1 video)"
    assert not (out / "any_out" / "evaluation.png").exists()
    (column,) = columns
    assert (column["samples"], column["choice"], column["chance"]) == (3, None, None)
    assert [(row["key"], row["answer"], row["kind"]) for row in rows] == [
        ("plain", "It is red.", None),
        ("other", rows[0]["prediction"], None),
        ("text", "It is red.", "greeting"),
    ]
    # Right is what the meta says, not the turn; and that is compared as text.
    assert [row["correct"] for row in rows[:2]] == [False, True]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


def _compare_methods(out: Path, data: Path) -> None:
    """The model's own way gives what it gives alone; another is told apart question by question."""
    methods = "methods=[query,random,query reduction.score=random]"
    model = [f"checkpoint={out / 'hf'}", f"data={data}", f"samples={ASKED}"]
    lines = _printed(*model, methods, "budgets=[1,0.5]", f"out={out / 'methods'}")
    _, rows, _ = _report(out / "methods")
    columns = {row["column"] for row in rows}
    assert columns == {"none", "query 0.5", "random 0.5", "query reduction.score=random 0.5"}
    _, alone, _ = _report(out / "export")
    for column, budget in (("none", 1.0), ("query 0.5", 0.5)):
        assert [row["prediction"] for row in rows if row["column"] == column] == [
            row["prediction"] for row in alone if row["budget"] == budget
        ]
    right = {column: [row["correct"] for row in rows if row["column"] == column] for column in columns}
    apart = 100 * (sum(right["query 0.5"]) - sum(right["random 0.5"])) / ASKED
    (line,) = [line for line in lines[: len(lines) // 2] if line.startswith("  query minus random ")]
    assert f"{apart:+.1f} (" in line
    with pytest.raises(SystemExit, match="2"):
        _printed(*model, methods, "reduction.layers=all")


def test_figures_are_the_demo_s_and_the_export_s(tmp_path: Path) -> None:
    make_demo_data(f"--out {tmp_path} --train 0 --validation {SAMPLES} --frames 16 --fps 2 --workers 1".split())
    run_world(1, _any_data, tmp_path / "validation", tmp_path / "any")
    run_world(1, _evaluate, tmp_path / "validation", tmp_path)


def _any_data(data: Path, out: Path) -> None:
    """A data set without choices, in which the right answer of one sample is what the model writes."""
    from hybridprune_megatron.data.stored_samples import read_samples

    video = next(read_samples(data)).videos[0]
    asked = {"role": "user", "content": "<video>\nWhat colour is the needle?"}
    written = _written(data)
    with ShardWriter(out, "val") as writer:
        writer.add("plain", [asked, SAID], [("mp4", video)])
        writer.add("broken", [asked, SAID], [("mp4", b"no video")])
        writer.add("other", [asked, SAID], [("mp4", video)], {"answer": written})
        writer.add("unanswered", [asked], [("mp4", video)])
        writer.add("none_of_them", [asked, SAID], [("mp4", video)], {"choices": ["a", "b"]})
        writer.add("number", [asked, SAID], [("mp4", video)], {"answer": 3})
        writer.add("text", [{"role": "user", "content": "Hello?"}, SAID], [], {"kind": "greeting"})


def _written(data: Path) -> str:
    """What the base model writes about the first clip at half of its tokens."""
    from hybridprune_megatron.data.conversation import read_conversation
    from hybridprune_megatron.data.sample_encoder import SampleEncoder
    from hybridprune_megatron.data.stored_samples import read_samples
    from hybridprune_megatron.evaluation.answering import AnsweringModel
    from hybridprune_megatron.evaluation.judging import reduction_at

    cfg = checkpoint_config(WEIGHTS, ["experiment=demo", "reduction.budget=0.5"])
    encoder, model = SampleEncoder(cfg), AnsweringModel.load(WEIGHTS, cfg, is_export=False)
    asked = read_conversation([{"role": "user", "content": "<video>\nWhat colour is the needle?"}])
    batch, hidden = model.embedded([encoder.prompt("one", asked, next(read_samples(data)).videos)])
    (ids,) = model.written(model.prefilled(batch, hidden, reduction_at(cfg, 0.5)), encoder.end_id, 32)
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["checkpoint=none"], "checkpoint=none: is not there"),
        (["checkpoint=conf"], "no complete checkpoint there"),
        (["budgets=[1]"], "checkpoint=None: must be set"),
        ([f"checkpoint={WEIGHTS}", "experiment=demo", "data=conf"], "data=conf: is not an Energon data set"),
        ([f"checkpoint={WEIGHTS}", "budgets=[1,1]"], "budgets=[1.0, 1.0]: must be one or more, each once"),
        ([f"checkpoint={WEIGHTS}", "budgets=[]"], "budgets=[]: must be one or more"),
        ([f"checkpoint={WEIGHTS}", "budgets=[1,half]"], "budgets=[1,half]: must be a list"),
        ([f"checkpoint={WEIGHTS}", "budgets=[1.5]"], "budgets[0]=1.5: must be above 0"),
        ([f"checkpoint={WEIGHTS}", "batch_size=0"], "batch_size=0: must be"),
        ([f"checkpoint={WEIGHTS}", "experiment=demo", "bugdets=1"], "bugdets"),
        ([f"checkpoint={WEIGHTS}", "methods=[evs,evs]"], "methods=['evs', 'evs']: must be one or more, each once"),
        ([*_DEMO, "methods=[evss]"], "methods=evss at 0.25: reduction=evss"),
        ([*_DEMO, "methods=[evs trainer.seed=3]"], "changes to a method are keys of reduction"),
        ([*_DEMO, "methods=[evs]", "budgets=[1]"], "methods drop nothing at 1"),
        ([*_DEMO, "methods=[query reduction.score=nowhere.Score]"], "nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridprune_megatron.commands.evaluate import main

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("hybridprune evaluate: ")
    assert words in said
    assert said.count("\n") == 1
