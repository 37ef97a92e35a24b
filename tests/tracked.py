"""The files of the project, without those that its users made beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[Path]:
    """Files under version control, or all files outside of ignored folders where there is no git (an archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        skipped = {".venv", "runs", "build", ".git"}
        return [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.parts)]
    # A file that is deleted but not committed yet is listed still.
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]
