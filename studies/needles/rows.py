"""Rows of the study on disk: one JSON object a line, appended as they come, so that a killed study loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Rows:
    """The rows of one study.

    Args:
        path: of the file; made with its first row.
        settings: what every row depends on besides its own fields; rows of other settings are refused.

    Raises:
        ValueError: the file holds rows of other settings, or a line that is none.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.by_key: dict[str, dict[str, Any]] = {}
        for row in self.read(path).values():
            known = row["settings"]
            names = [name for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
            if names:
                changed = ", ".join(f"{name}={known.get(name)}, now {settings.get(name)}" for name in names)
                raise ValueError(
                    f"{path} holds rows of other settings ({changed}): put them back, or move the file away"
                )
            self.by_key[row["key"]] = row

    @staticmethod
    def read(path: Path) -> dict[str, dict[str, Any]]:
        """Rows of any settings by key; none if the file is not there.

        Raises:
            ValueError: a line that is not a row.
        """
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            try:
                row = json.loads(line)
                found[row["key"]] = row
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}:{number} is not a row of a study ({error!r}): remove the line") from None
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Appends a finished row."""
        row = row | {"settings": self.settings}
        self.by_key[row["key"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()


def rows_with(path: Path | None, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows about reductions that were measured under some facts, by the reduction; none if the file is not there."""
    rows = [json.loads(line) for line in (path.read_text().splitlines() if path and path.is_file() else [])]
    return {row["reduction"]: row for row in rows if {name: row[name] for name in facts} == facts}


def append_row(path: Path | None, row: dict[str, Any]) -> None:
    """Writes a finished row at the end of a file; None: nowhere."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
