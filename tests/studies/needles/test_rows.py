"""Rows survive a kill, and rows of another study are not mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.needles.rows import Rows


def test_rows_are_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "study" / "rows.jsonl"
    Rows(path, {"base": "a"}).add({"key": "one", "accuracy": 0.5})
    Rows(path, {"base": "a"}).add({"key": "two", "accuracy": 0.25})
    again = Rows(path, {"base": "a"})
    assert {key: row["accuracy"] for key, row in again.by_key.items()} == {"one": 0.5, "two": 0.25}
    assert Rows.read(path).keys() == again.by_key.keys()


def test_rows_of_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, {"base": "a", "steps": 60}).add({"key": "one"})
    with pytest.raises(ValueError, match=r"rows of other settings \(base=a, now b\)"):
        Rows(path, {"base": "b", "steps": 60})


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, {}).add({"key": "one"})
    with path.open("a") as file:
        file.write('{"key": "tw')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not a row of a study"):
        Rows(path, {})
