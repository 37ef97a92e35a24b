"""Units reach workers, rows reach the file, and a killed study leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.needles.cells import OURS, Unit
from studies.needles.pool import run_all
from studies.needles.rows import Rows


@dataclass
class FakeRunner:
    """Answers at once; breaks on one method."""

    threads: int = 1

    def measure(self, unit: Unit, budgets: tuple[float, ...], emit: Any) -> None:
        if unit.method == "utrc":
            raise ValueError("no such thing")
        for budget in budgets:
            emit({"key": unit.key(budget), "stage": unit.stage, "method": unit.method, "budget": budget,
                  "seed": unit.seed, "accuracy": 0.5})  # fmt: skip


@dataclass
class SlowRunner:
    """Says which process it is in and then works on without end."""

    note: Path
    threads: int = 1

    def measure(self, unit: Unit, budgets: tuple[float, ...], emit: Any) -> None:
        self.note.write_text(str(os.getpid()))
        time.sleep(600)


def before(unit: Unit) -> bool:
    return unit.stage == "before" and unit.budgets in ((0.25,), (1.0,))


def test_units_run_on_workers_and_failures_are_named(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl", {})
    rows.add(
        {"key": f"before/{OURS}/0.25/0", "stage": "before", "method": OURS, "budget": 0.25, "seed": 0, "accuracy": 0.9}
    )
    written = []
    failures = run_all(FakeRunner(), rows, 2, before, lambda: written.append(len(rows.by_key)))
    assert failures == ["before/utrc/seed 0: ValueError: no such thing"]
    assert rows.by_key[f"before/{OURS}/0.25/0"]["accuracy"] == 0.9
    assert "before/none/1/0" in rows.by_key
    assert "before/fastv/0.25/0" in rows.by_key
    # Written again after every new row.
    assert written == list(range(2, len(rows.by_key) + 1))
    assert Rows.read(rows.path).keys() == rows.by_key.keys()


def start_study(folder: Path) -> None:
    run_all(SlowRunner(folder / "note"), Rows(folder / "rows.jsonl", {}), 1, before, lambda: None)


def test_a_killed_study_leaves_no_worker_behind(tmp_path: Path) -> None:
    study = multiprocessing.get_context("spawn").Process(target=start_study, args=(tmp_path,))
    study.start()
    note = tmp_path / "note"
    wait_for(lambda: note.is_file() and bool(note.read_text()))
    worker = int(note.read_text())
    assert study.pid is not None
    os.kill(study.pid, signal.SIGKILL)
    study.join()
    wait_for(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
