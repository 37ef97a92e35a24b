"""The README's way of a checkpoint through import, finetuning, export and lmms-eval, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## A checkpoint all the way"
_SKIPPED = (".venv", ".git", "runs", "build", "__pycache__", ".*_cache", "*.egg-info")


def commands() -> list[list[str]]:
    """The block below the heading, one list of words a command."""
    section = (ROOT / "README.md").read_text().split(HEADING + "\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    (.*)$", section, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_every_command_runs_and_the_last_one_scores(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*_SKIPPED))
    environment = {**os.environ, "PYTHONPATH": str(clone), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    printed = ""
    for program, *arguments in commands():
        assert program == "python", program
        done = subprocess.run(
            [sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        printed = done.stdout
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (clone / "runs" / "twin_vl" / "checkpoints" / "step_00000020").is_dir()
    # lmms-eval ends with 0 whatever happens; its table comes only with a result.
    row = re.search(r"\|hybridprune_needle\|none *\| *0\|exact_match\|[^|]*\|([^|]*)\|", printed)
    assert row is not None, printed[-3000:]
    assert 0 <= float(row.group(1)) <= 1
