"""Stages of a long job: each prints one line with its time, and one that is done already is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.outputs import whole_file

_WIDTH = 64


class Stages:
    """Runs stages and keeps their results as JSON files, so that a killed job continues where it was.

    Args:
        folder: where the results go.
        report: gets one line a stage.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print) -> None:
        self._folder = folder
        self._report = report
        self.seconds: dict[str, float] = {}

    def run(
        self,
        name: str,
        title: str,
        work: Callable[[], dict[str, Any]],
        inputs: Any,
        products: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """The result of a stage, computed or read back.

        Args:
            name: of the result's file.
            title: for the user.
            work: computes the result, plain values only.
            inputs: plain values; the result is computed again if they changed.
            products: files or folders that the stage leaves; it runs again if one is missing.
        """
        path = self._folder / f"{name}.json"
        key = fingerprint(inputs)
        if path.is_file() and all(product.exists() for product in products):
            known = json.loads(path.read_text())
            if known["key"] == key:
                self.seconds[name] = known["seconds"]
                self._report(f"{title:<{_WIDTH}} done before")
                return known["result"]
        self._report(f"{title} ...")
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        write_json(path, {"key": key, "seconds": self.seconds[name], "result": result})
        self._report(f"{title:<{_WIDTH}} {self.seconds[name]:7.1f} s")
        # As read back, so that a first run and a resumed one see the same types.
        return json.loads(json.dumps(result))


def fingerprint(values: Any) -> str:
    """A short name for plain values, equal only for equal values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What changed between two nested dictionaries, as "reduction.budget=0.35 (was 0.25)" lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted({*old, *new})
            for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [f"{key}={new} (was {old})"]


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(values, indent=2) + "\n")
