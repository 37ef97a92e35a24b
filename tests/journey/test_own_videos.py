"""A stranger's whole way, through the installed command: own videos, rows in three forms, an answer at the end.

docs/own_videos.md is this test in words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from studies.needles.needles import clip_paths

ROOT = Path(__file__).resolve().parents[2]
HYBRIDPRUNE = Path(sys.executable).with_name("hybridprune")
STEPS = 6
#: First frame and file of four cuts of clips that packages bring along.
CUTS = {"one.mp4": (0, 0), "two.mp4": (1, 10), "three.mp4": (2, 5), "four.mp4": (0, 40)}
QUESTION = "What is shown?"


def cut(source: Path, first: int, target: Path, frames: int = 24) -> None:
    """Some frames of a video as a file of their own, as any editor would write it."""
    with av.open(str(source)) as clip, av.open(str(target), "w") as out:
        stream = out.add_stream("libx264", rate=12, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number, frame in enumerate(clip.decode(video=0)):
            if first <= number < first + frames:
                picture = frame.reformat(160, 120, "yuv420p")
                picture.pts = None
                out.mux(stream.encode(picture))
        out.mux(stream.encode())


def rows() -> list[dict[str, object]]:
    """One conversation each, in the forms that people have."""
    return [
        {"id": "a", "video": "one.mp4", "conversations": [
            {"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]},
        {"id": "b", "videos": ["two.mp4"], "messages": [
            {"role": "user", "content": f"<video>{QUESTION}"}, {"role": "assistant", "content": "blue"}]},
        {"video": "three.mp4", "question": QUESTION, "answer": "red", "choices": ["red", "blue"], "kind": "colour"},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stranger's folder: videos, rows for training in three forms, rows to validate by."""
    home = tmp_path_factory.mktemp("own")
    (home / "videos").mkdir()
    clips = clip_paths()
    for name, (clip, first) in CUTS.items():
        cut(Path(clips[clip]), first, home / "videos" / name)
    # A file that is no video, as every real folder has one.
    (home / "videos" / "broken.mp4").write_bytes(b"\0" * 1000)
    broken = {"id": "c", "video": "broken.mp4", "conversations": rows()[0]["conversations"]}
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows() * 4, broken]))
    held_out = {**rows()[2], "video": "four.mp4"}
    (home / "held_out.json").write_text(json.dumps([held_out]))
    return home


def run(folder: Path, *arguments: str) -> str:
    """What the installed command prints; it must end well and without a traceback or a warning of a library."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [HYBRIDPRUNE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_from_own_videos_to_an_answer(folder: Path) -> None:
    printed = run(folder, "shards", "--conversations", "train.jsonl", "--videos", "videos", "--out", "data/train")
    assert printed.startswith("data/train: 12 samples, 1 rows left out (1 video)"), printed
    run(folder, "shards", "--conversations", "held_out.json", "--videos", "videos", "--out", "data/held_out", "--split",
        "val")  # fmt: skip

    printed = run(
        folder, "finetune", "experiment=demo", "name=own", "data.train=data/train", "data.validation=data/held_out",
        "data.num_frames=8", "data.sequence_length=512", "trainer.global_batch_size=1", f"trainer.max_steps={STEPS}",
        f"trainer.eval_every_n_steps={STEPS // 2}", "trainer.eval_samples=1", "data.packing_buffer=2",
        "data.shuffle_buffer=2", "reduction.budget=0.5",
    )  # fmt: skip
    log = [json.loads(line) for line in (folder / "runs/own/train_log.jsonl").open()]
    assert [row["step"] for row in log] == [*range(1, STEPS + 1)]
    assert log[-1]["loss"] < log[0]["loss"]
    validated = [json.loads(line) for line in (folder / "runs/own/validation_log.jsonl").open()]
    assert [row["step"] for row in validated] == [STEPS // 2, STEPS]
    assert {"loss", "loss_full", "accuracy", "accuracy_full"} <= set(validated[0])
    # The end of a run names what people do next.
    assert "hybridprune evaluate checkpoint=runs/own" in printed
    assert "hybridprune export --checkpoint runs/own" in printed

    printed = run(folder, "plot", "runs/own")
    assert Image.open(folder / "runs/own/runs.png").size[0] > 500

    printed = run(folder, "evaluate", "checkpoint=runs/own", "budgets=[1,0.5]", "out=runs/own/evaluation")
    report = json.loads((folder / "runs/own/evaluation/evaluation.json").read_text())
    assert len(report["columns"]) == 2
    # The last validation's loss, of the same model on the same sample.
    assert report["columns"][1]["loss"]["mean"] == pytest.approx(validated[-1]["loss"], rel=1e-3)
    predictions = [json.loads(line) for line in (folder / "runs/own/evaluation/predictions.jsonl").open()]
    assert {row["budget"] for row in predictions} == {1.0, 0.5}

    run(folder, "predict", "checkpoint=runs/own", "videos=videos", f"question={QUESTION}", "out=answers.jsonl")
    answers = {row["key"]: row for row in map(json.loads, (folder / "answers.jsonl").open())}
    assert sorted(answers) == sorted(CUTS)

    run(folder, "export", "--checkpoint", "runs/own", "--out", "runs/own/hf")
    assert (folder / "runs/own/hf/config.json").is_file()
    said = run(folder, "ask", "--model", "runs/own/hf", "--video", "videos/four.mp4", "--question", QUESTION)
    # The export says what the checkpoint said.
    assert answers["four.mp4"]["prediction"] in said
