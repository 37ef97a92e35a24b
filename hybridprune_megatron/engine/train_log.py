"""The run's own record: one JSON line a step, with every digit, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: In a run's folder: a row per step, and a row per validation.
TRAIN_LOG = "train_log.jsonl"
VALIDATION_LOG = "validation_log.jsonl"


class TrainLog:
    """Appends rows to a JSON-lines file. Only rank 0 should own one.

    A row is written in one call and flushed, so a killed process leaves at most one broken last line, which
    :meth:`truncate_after` removes.
    """

    def __init__(self, path: Path) -> None:
        """Args: path: the file; its folder is made."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row; floats keep all their digits (Python's repr reads back exactly)."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drops rows whose "step" is past ``step``, and a broken last line. The file is replaced in one move."""
        if not self.path.exists():
            return
        kept = [row for row in read_train_log(self.path) if row["step"] <= step]
        scratch = self.path.with_name(self.path.name + ".tmp")
        with scratch.open("w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in kept)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(self.path)


def read_train_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a train_log.jsonl in file order; a broken last line (a killed run) is left out.

    Raises:
        ValueError: if any other line is not a JSON object.
    """
    lines = path.read_text().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            # Not read strictly: a step that was skipped has NaN for its loss.
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path} line {number} is not JSON: {line[:60]!r}; delete the line or the file")
    return rows
