"""The demo's export in lmms-eval's own command line: every sample gets the score that our evaluation gives it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from hybridprune_megatron.config import Config, load_config
from hybridprune_megatron.data.shards import ShardWriter
from tests.export.conftest import other_transformers

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = (1.0, 0.25)
SAMPLES = 10
TASK = "hybridprune_needle"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out clips as the demo has them, every kind of question twice."""
    folder = tmp_path_factory.mktemp("data")
    clips = ["--frames", "16", "--fps", "2", "--workers", "1", "--seed", "1"]
    script("make_demo_data").main(["--out", str(folder), "--train", "0", "--validation", str(SAMPLES), *clips])
    return folder / "validation"


def demo_config(data: Path, budget: float) -> Config:
    """The demo in bf16, the precision in which lmms-eval loads every model."""
    overrides = (f"data.validation={data}", f"reduction.budget={budget}", "trainer.precision=bf16")
    return load_config(["experiment=demo", *overrides])


def our_scores(data: Path, budget: float, export: Path) -> list[bool]:
    """Our evaluation of the demo's base model, sample by sample; the model is exported on the way."""
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.evaluation.accuracy import evaluate
    from hybridprune_megatron.evaluation.held_out import load_questions
    from hybridprune_megatron.export.write import export_model

    cfg = demo_config(data, budget)
    model = load_model(ROOT / "assets" / "demo" / "base.safetensors", cfg)
    export_model(model, cfg, export)
    questions = load_questions(cfg, SAMPLES)
    found = evaluate(model, questions, model.reduction, 2 * cfg.data.sequence_length)
    return [found.correct[question.sample.key] for question in questions]


def command_scores(data: Path, export: Path, out: Path) -> list[tuple[str, bool]]:
    """What ``hybridprune evaluate`` says of every sample of an export: what it writes, and whether that is right."""
    from hybridprune_megatron.commands.evaluate import main

    main([f"checkpoint={export}", f"data={data}", f"budgets={budget_of(export)}", f"out={out}"])
    rows = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    return [(row["prediction"], row["correct"]) for row in rows]


def budget_of(export: Path) -> float:
    """The budget that an export runs at."""
    return json.loads((export / "config.json").read_text())["reduction"]["budget"]


def their_scores(folder: Path, runs: list[dict[str, object]]) -> list[list[tuple[str, bool]]]:
    """lmms-eval's text and score of every sample of every run, in one start of its command."""
    (folder / "runs.yaml").write_text(yaml.safe_dump(runs))
    packages = os.pathsep.join(other_transformers())
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--config", "runs.yaml"],
        cwd=folder,
        # The transformers of this process, which need not be the installed one; not this checkout.
        env={**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    scores = []
    for run in runs:
        files = list((folder / str(run["output_path"])).rglob(f"*_samples_{TASK}.jsonl"))
        assert len(files) == 1, done.stdout[-3000:] + done.stderr[-3000:]
        samples = sorted(map(json.loads, files[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])
        scores.append([(sample["filtered_resps"].strip(), sample["exact_match"] == 1.0) for sample in samples])
        (total,) = (folder / str(run["output_path"])).rglob("*_results.json")
        accuracy = json.loads(total.read_text())["results"][TASK]["exact_match,none"]
        assert accuracy == pytest.approx(sum(right for _, right in scores[-1]) / len(samples))
    return scores


def test_every_sample_scores_as_in_our_evaluation(data: Path, tmp_path: Path) -> None:
    script("make_lmms_task").main(["--data", str(data), "--out", str(tmp_path / "task")])
    ours = [our_scores(data, budget, tmp_path / f"hf_{budget}") for budget in BUDGETS]
    arguments = "trust_remote_code=True,device=cpu,device_map=cpu"
    runs: list[dict[str, object]] = [
        {
            "model": "huggingface",
            "model_args": f"pretrained={tmp_path / f'hf_{budget}'},{arguments}",
            "tasks": TASK,
            "include_path": str(tmp_path / "task"),
            # One by one, and in batches that are padded on the left.
            "batch_size": size,
            "log_samples": True,
            "output_path": f"out_{budget}",
        }
        for budget, size in zip(BUDGETS, ("1", "4"))
    ]
    theirs = their_scores(tmp_path, runs)
    assert [[right for _, right in scores] for scores in theirs] == ours
    # The command, on the same exports: the same text and the same score.
    for budget, scores in zip(BUDGETS, theirs):
        assert command_scores(data, tmp_path / f"hf_{budget}", tmp_path / f"ours_{budget}") == scores
    # Neither is right or wrong throughout, and what the reduction costs shows.
    assert all(0 < sum(scores) < SAMPLES for scores in ours)
    assert ours[0] != ours[1]


ASKED = {"role": "user", "content": "<video>\nWhere is the needle?"}
ANSWERED = {"role": "assistant", "content": "left"}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Where is <video>\nthe needle?"}, ANSWERED],
        [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED],
        [ASKED, ANSWERED, {"role": "user", "content": "And now?"}, ANSWERED],
    ],
    ids=["text first", "system", "two questions"],
)
def test_what_lmms_eval_would_ask_differently_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: list[dict[str, str]]
) -> None:
    with ShardWriter(tmp_path / "data", "val") as writer:
        writer.add("one", messages, [("mp4", b"a video")], {"answer": "left", "kind": "place", "choices": ["left"]})
    with pytest.raises(SystemExit, match="2"):
        script("make_lmms_task").main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "task")])
    error = capsys.readouterr().err
    assert error.startswith("hybridprune make_lmms_task: sample one: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "task").exists()


def test_a_task_is_made_of_any_data_set_of_questions(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", "val") as writer:
        writer.add("bare", [ASKED, ANSWERED], [("webm", b"a video")])
        writer.add(
            "said", [ASKED, ANSWERED], [("mp4", b"another")], {"answer": "L", "choices": ["L", "R"], "kind": "place"}
        )
        writer.add("waits", [ASKED], [("mp4", b"a third")], {"answer": "L"})
    out = tmp_path / "task"
    script("make_lmms_task").main(["--data", str(tmp_path / "data"), "--out", str(out), "--max-new-tokens", "7"])
    rows = [json.loads(line) for line in (out / "questions.jsonl").open()]
    assert [(row["key"], row["kind"], row["question"], row["answer"]) for row in rows] == [
        ("bare", "", "Where is the needle?", "left"),
        ("said", "place", "Where is the needle?", "L"),
        ("waits", "", "Where is the needle?", "L"),
    ]
    assert [(out / row["video"]).read_bytes() for row in rows] == [b"a video", b"another", b"a third"]
    task = (out / f"{TASK}.yaml").read_text()
    assert task == (ROOT / "recipes" / "lmms_eval" / f"{TASK}.yaml").read_text().replace("tokens: 32", "tokens: 7")
