"""recipes/study.py says in one line, before anything is measured, what it lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "study.py"), *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("samples", [None, 3])
def test_held_out_samples_that_are_missing_are_refused(tmp_path: Path, samples: int | None) -> None:
    if samples is not None:
        (tmp_path / "needles.json").write_text(json.dumps({"samples": samples}))
    rows = ROOT / "docs" / "study" / "rows.jsonl"
    before = rows.read_bytes()
    run = study(f"data.validation={tmp_path}", "trainer.eval_samples=4")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1, run.stderr
    if samples is None:
        assert f"data.validation={tmp_path}" in run.stderr
        assert "studies/base/make_bench_base.sh data" in run.stderr
    else:
        assert "trainer.eval_samples=4" in run.stderr
        assert "holds 3 samples" in run.stderr
    assert rows.read_bytes() == before
