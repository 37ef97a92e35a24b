"""The picture of runs: what it smooths, which panels it has, and that it stays apart from other people's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridprune_megatron.commands import plot
from hybridprune_megatron.evaluation.run_plot import smoothed, validated


def write_run(folder: Path, steps: int = 40, **validation: float) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 9.0 / s, "tokens": 4000, "seconds": 2.0} for s in range(1, steps + 1)]
    # A step that was left out.
    rows[3]["loss"] = float("nan")
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if validation:
        row = {"step": steps, **validation, "samples": 8, "seconds": 1.0}
        (folder / "validation_log.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_smoothed_value_is_the_mean_of_those_before_it() -> None:
    values = [1.0, 2.0, float("nan"), 6.0, 8.0]
    np.testing.assert_allclose(smoothed(values, 2), [1.0, 1.5, 2.0, 6.0, 7.0])
    np.testing.assert_allclose(smoothed(values[:2], 9), [1.0, 1.5])
    assert np.isnan(smoothed([float("nan")], 1)).all()


def test_losses_and_shares_are_found_by_name() -> None:
    rows = [{"step": 1, "loss": 1.0, "loss_full": 0.5, "accuracy": 0.5, "samples": 8, "seconds": 1.0}]
    assert validated({"a": ([], []), "b": ([], rows)}) == (["loss", "loss_full"], ["accuracy"])


def test_one_run_gets_its_picture_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    plot.main([str(run)])
    assert capsys.readouterr().out == f"{run}/runs.png: 1 run, 40 steps\n"
    narrow = Image.open(run / "runs.png").size
    # Validations get panels of their own, and an earlier picture is replaced.
    (run / "validation_log.jsonl").write_text(json.dumps({"step": 40, "loss": 1.0, "accuracy": 0.5}) + "\n")
    plot.main([str(run)])
    assert Image.open(run / "runs.png").size[1] > narrow[1]


def test_a_run_that_distils_gets_a_panel_of_the_parts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    plot.main([str(run)])
    narrow = Image.open(run / "runs.png").size[0]
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    rows = [row | {"answer_loss": 1.0, "distillation_loss": 0.5} for row in rows]
    (run / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.main([str(run)])
    assert Image.open(run / "runs.png").size[0] > narrow


def test_several_runs_are_one_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), 10 + n, loss=1.0, loss_full=0.9, accuracy=0.1 * n) for n in range(9)]
    plot.main([*map(str, runs), "--out", str(tmp_path / "all.png")])
    assert Image.open(tmp_path / "all.png").size[0] > 1000


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "mine.png").write_bytes(b"a picture of mine")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train_log.jsonl").write_text("")
    for arguments, says in (
        ([str(tmp_path)], f"{tmp_path}: no train_log.jsonl; give the output_dir of a run"),
        ([str(tmp_path / "new")], "has no step yet; try again"),
        ([str(run), "--out", str(tmp_path / "a.pdf")], "a picture is a .png"),
        ([str(run), "--out", str(tmp_path / "no" / "a.png")], "its folder is not there"),
        ([str(run), "--out", str(tmp_path / "mine.png")], "exists and was not written by hybridprune plot"),
    ):
        with pytest.raises(SystemExit) as ended:
            plot.main(arguments)
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("hybridprune plot: ")
        assert says in line
        assert line.count("\n") == 1
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of mine"
