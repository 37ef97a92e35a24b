"""Runs the units of the study on worker processes, each with one model, and stores rows as they come."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from queue import Empty
from typing import Any

from tqdm import tqdm

from studies.needles.cells import Unit, units
from studies.needles.rows import Rows
from studies.needles.run import Runner, work

_POLL_SECONDS = 5


def run_all(
    runner: Runner, rows: Rows, workers: int, select: Callable[[Unit], bool], after_row: Callable[[], None]
) -> list[str]:
    """Measures everything that has no row yet.

    Args:
        runner: measures a unit; copied to every worker.
        rows: grows with every result.
        workers: processes.
        select: which units to measure.
        after_row: called after every stored row.

    Returns:
        One line a failed unit.

    Raises:
        RuntimeError: a worker died.
    """
    # Fresh interpreters: torch and megatron do not survive a fork with threads.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    tasks = [context.Queue() for _ in range(workers)]
    processes = [context.Process(target=work, args=(runner, queue, results), daemon=False) for queue in tasks]
    for process in processes:
        process.start()
    try:
        return _feed(rows, processes, tasks, results, select, after_row)
    finally:
        for queue in tasks:
            queue.put(None)
        for process in processes:
            # An error, or Ctrl-C, does not wait for units that are half done: they are measured again.
            process.join(timeout=0 if sys.exception() else 30)
            if process.is_alive():
                process.terminate()


def _feed(
    rows: Rows,
    processes: list[Any],
    tasks: list[Any],
    results: Any,
    select: Callable[[Unit], bool],
    after_row: Callable[[], None],
) -> list[str]:
    failures: list[str] = []
    given: set[Unit] = set()
    busy: dict[Unit, int] = {}
    idle = list(range(len(processes)))
    expected = {unit.key(budget) for unit in units(rows.by_key) if select(unit) for budget in unit.budgets}
    with tqdm(total=len(expected), initial=len(expected & set(rows.by_key)), desc="study", unit="row") as bar:
        while True:
            while idle and (unit := _next(rows, given, busy, select)) is not None:
                given.add(unit)
                worker = idle.pop()
                busy[unit] = worker
                tasks[worker].put((unit, unit.missing(rows.by_key)))
            if not busy:
                return failures
            kind, content = _wait(results, processes)
            if kind == "row":
                rows.add(content)
                after_row()
                bar.update()
                bar.set_postfix_str(f"{content['key']} {content['accuracy']:.3f}")
                continue
            unit = content if kind == "done" else content[0]
            idle.append(busy.pop(unit))
            if kind == "failed":
                failures.append(f"{unit.stage}/{unit.method}/seed {unit.seed}: {content[1]}")
                tqdm.write(failures[-1])


def _next(rows: Rows, given: set[Unit], busy: dict[Unit, int], select: Callable[[Unit], bool]) -> Unit | None:
    """The first unit with something missing that nobody works on, nor on its weights."""
    training = {unit.weights for unit in busy if unit.weights}
    for unit in units(rows.by_key):
        if unit not in given and unit.weights not in training and select(unit) and unit.missing(rows.by_key):
            return unit
    return None


def _wait(results: Any, processes: list[Any]) -> tuple[str, Any]:
    while True:
        try:
            return results.get(timeout=_POLL_SECONDS)
        except Empty:
            dead = [process for process in processes if not process.is_alive()]
            if dead:
                raise RuntimeError(f"a worker of the study died with code {dead[0].exitcode}; start it again") from None
