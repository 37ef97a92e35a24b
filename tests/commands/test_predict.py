"""``hybridprune predict``: a folder or a file of rows, killed and continued, with rows that cannot be used."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.make_demo_data import main as make_demo_data
from tests.own_time import HANG_SECONDS
from tests.tracked import ROOT
from tests.worlds import run_world

WEIGHTS = ROOT / "assets" / "demo" / "base.safetensors"
QUESTION = "What colour is the needle?"


def _predicted(out: Path, *arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the file, and what is printed."""
    from hybridprune_megatron.commands.predict import main

    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([*arguments, f"out={out}"])
    return [json.loads(line) for line in out.open()], text.getvalue().splitlines()


def _write_clips(clips: Path, data: Path) -> None:
    """Four videos, one of them deeper, and what is none."""
    from hybridprune_megatron.data.stored_samples import read_samples

    (clips / "more").mkdir(parents=True)
    for index, sample in enumerate(read_samples(data)):
        video = sample.videos[0]
        assert isinstance(video, bytes)
        (clips / (f"more/{index}.MP4" if index == 2 else f"{index}.mp4")).write_bytes(video)
    (clips / "broken.mp4").write_bytes(b"no video")
    (clips / "note.txt").write_text("no video either")
    (clips / ".hidden.mp4").write_bytes(b"nor this")


def _predict(folder: Path, data: Path) -> None:
    from hybridprune_megatron.evaluation.answering import AnsweringModel

    clips = folder / "clips"
    _write_clips(clips, data)
    bare = [f"checkpoint={WEIGHTS}", "experiment=demo", "batch_size=2"]

    # One question about every video.
    out = folder / "deep" / "answers.jsonl"
    rows, printed = _predicted(out, *bare, f"videos={clips}", f"question={QUESTION}")
    assert [row["key"] for row in rows] == ["0.mp4", "1.mp4", "3.mp4", "more/2.MP4"]
    assert {row["question"] for row in rows} == {QUESTION}
    assert all(row["prediction"] for row in rows)
    assert printed[0] == f"{out}: 4 answers, 1 rows left out (1 video)"
    assert "broken.mp4" in printed[1]

    # Killed in the middle of a line: what was whole is not asked again, the rest is, with the same answers.
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    asked: list[int] = []
    original = AnsweringModel.written
    AnsweringModel.written = lambda *arguments: asked.append(len(arguments[1].logits)) or original(*arguments)
    again, printed = _predicted(out, *bare, f"videos={clips}", f"question={QUESTION}")
    AnsweringModel.written = original
    assert out.read_bytes() == whole
    assert again == rows
    assert asked == [2]
    assert printed[0].startswith(f"{out}: 4 answers (2 of them from before), 1 rows left out")

    _predict_rows(folder, rows)


def _predict_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """An export, and rows of every form: the same answers to the same questions."""
    from hybridprune_megatron.config.stored_run import checkpoint_config
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.export.write import export_model

    cfg = checkpoint_config(WEIGHTS, ["experiment=demo"])
    export_model(load_model(WEIGHTS, cfg), cfg, folder / "hf")
    talk = [
        {"from": "human", "value": f"<video>\n{QUESTION}"},
        {"from": "gpt", "value": "grey"},
    ]
    file = folder / "clips" / "rows.jsonl"
    written = [
        {"video": "0.mp4", "question": QUESTION},
        {"id": "a", "video": "1.mp4", "question": QUESTION, "answer": "grey", "choices": ["grey", "red"]},
        {"id": "a", "videos": ["3.mp4"], "conversations": talk},
        {"id": "b", "video": "more/2.MP4", "conversations": talk[:1]},
        "{not json",
        {"id": "c", "video": "../data.mp4", "question": QUESTION},
        {"id": "d", "video": ["0.mp4", "1.mp4"], "conversations": talk},
        {"id": "e", "video": "0.mp4", "conversations": []},
        {"id": "f", "video": "0.mp4", "question": "<video>"},
    ]
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in written))
    export = [f"checkpoint={folder / 'hf'}", f"rows={file}", "batch_size=3"]
    found, printed = _predicted(folder / "rows.jsonl", *export)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in rows]
    assert [row["key"] for row in found] == ["row-00000001", "a", "a-00000003", "b"]
    assert [row["answer"] for row in found] == [None, "grey", "grey", None]
    assert [row["videos"] for row in found] == [["0.mp4"], ["1.mp4"], ["3.mp4"], ["more/2.MP4"]]
    assert printed[0].endswith("4 answers, 5 rows left out (1 conversation, 1 json, 1 malformed, 2 video)")
    # A finished file is left as it is; other settings do not continue it.
    before = (folder / "rows.jsonl").read_bytes()
    _predicted(folder / "rows.jsonl", *export)
    assert (folder / "rows.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        _predicted(folder / "rows.jsonl", *export, "reduction.budget=0.5")
    assert (folder / "rows.jsonl").read_bytes() == before
    # Nothing to write, nothing there.
    with pytest.raises(SystemExit, match="2"):
        _predicted(folder / "none.jsonl", f"checkpoint={folder / 'hf'}", f"videos={folder / 'hf'}", "question=What?")
    assert not (folder / "none.jsonl").exists()


def test_every_usable_video_gets_an_answer_once(tmp_path: Path) -> None:
    make_demo_data(f"--out {tmp_path} --train 0 --validation 4 --frames 8 --fps 1 --workers 1".split())
    run_world(1, _predict, tmp_path, tmp_path / "validation")


CHECKPOINT = (f"checkpoint={WEIGHTS}", "experiment=demo")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*CHECKPOINT], "out=None: must be set"),
        ([*CHECKPOINT, "out=x", "videos=docs"], "question, rows: neither is given"),
        ([*CHECKPOINT, "out=x", "videos=docs", "question=What?", "rows=README.md"], "question, rows: both are given"),
        ([*CHECKPOINT, "out=x", "question=What?"], "videos=None: must be set"),
        ([*CHECKPOINT, "out=x", "question=What?", "videos=README.md"], "videos=README.md: is not a folder"),
        ([*CHECKPOINT, "out=x", "question=What?", "videos=nowhere"], "videos=nowhere: is not there"),
        ([*CHECKPOINT, "out=x", "rows=docs"], "rows=docs: is not a file"),
        ([*CHECKPOINT, "out=x", "question=", "videos=docs"], "question='': is empty, as an unset shell variable is"),
        (
            [*CHECKPOINT, "out=README.md", "question=What?", "videos=docs"],
            "line 1 was not written by hybridprune predict",
        ),
        ([*CHECKPOINT, "out=docs", "question=What?", "videos=docs"], "out=docs is not a file"),
        (["checkpoint=docs", "out=x", "question=What?", "videos=docs"], "no complete checkpoint there"),
    ],
)
def test_a_wrong_setting_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridprune_megatron.commands.predict import main

    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("hybridprune predict: ")
    assert words in said
    assert said.count("\n") == 1
    assert (ROOT / "README.md").read_bytes() == readme
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_is_wrong_is_said_before_anything_slow_is_imported(command: str, tmp_path: Path) -> None:
    watched = (
        "import sys; from hybridprune_megatron.commands import door\n"
        f"try: door.main([{command!r}, 'checkpoint={WEIGHTS}', 'experiment=demo', 'out=README.md',"
        " *(['question=What?', 'videos=docs'] if sys.argv[1] == 'predict' else ['data=docs'])])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, command], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.stdout == "2 []\n", done.stderr
