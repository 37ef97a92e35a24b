"""Reductions compared on other clips: rows that are there are printed, not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.needles.compare import main

ROW = {
    "reduction": "reduction=query", "correct": "1101", "kl": [0.0, 0.01, 0.03, 0.0], "retention": [1.0, 0.5],
    "weights": "w", "data": "d", "clips": 4,
}  # fmt: skip


def test_rows_of_the_same_clips_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare.jsonl"
    out.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"clips": 5, "correct": "00000"}) + "\n")
    before = out.read_text()
    main(["--data", "d", "--weights", "w", "--clips", "4", "--out", str(out), "reduction=query"])
    line = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "`reduction=query`",
        "75.0%",
        # Mean of 0, 0.01, 0.03 and 0; resampled means lie between the smallest and the largest.
        "0.010 (0.000 to 0.022)",
        # Of 0, log 2, log 4 and 0.
        "0.52",
        "0.750",
    ]
    assert out.read_text() == before
