"""``hybridprune finetune -m``: the runs of a sweep one after another, or one of them in a task of a Slurm array.

    hybridprune finetune -m experiment=demo reduction.budget=0.5,0.25 optim.lr=1e-4,3e-4
    sbatch --array=0-3 slurm/finetune.sh -m experiment=demo reduction.budget=0.5,0.25 optim.lr=1e-4,3e-4

All combinations are checked before the first begins. Every run resumes like any other, so the same command again goes
on where a sweep was stopped; when all are done it prints their table.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.sweep import SweepRun, chosen, sweep_runs
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.train_log import TRAIN_LOG, VALIDATION_LOG, read_train_log
from hybridprune_megatron.evaluation.report import text_table

_DOOR = "hybridprune_megatron.commands.door"
#: Exit status of a run that was asked to stop, see ``engine/preemption.py``.
STOPPED = 75
#: Steps whose mean loss is shown, as a share of all.
_LAST = 0.1
_NOT_FIGURES = {"step", "samples", "seconds"}


def array_task() -> int | None:
    """Which task of a Slurm array this is; None: no array."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    return int(number) if number.isdecimal() else None


def overrides_of_task(overrides: Sequence[str], task: int) -> list[str]:
    """The command line of one run, for a task of an array."""
    return list(chosen(sweep_runs(overrides), task).overrides)


def sweep(overrides: Sequence[str], launch: Launch) -> int:
    """Runs what is not done yet, prints the table, and returns the exit status.

    Args:
        overrides: with lists of values.
        launch: of this process; a sweep starts the processes of its runs itself.

    Raises:
        ConfigError: a combination is wrong, or a launcher already started several processes.
    """
    runs = sweep_runs(overrides)
    if launch.world_size > 1:
        raise ConfigError(
            f"-m in one of {launch.world_size} processes: start it once, it starts trainer.devices processes a run; on "
            f"Slurm submit an array, --array=0-{len(runs) - 1}"
        )
    statuses: dict[str, int] = {}
    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {run.cfg.output_dir}", flush=True)
        statuses[run.name] = _run(command(run))
        if statuses[run.name] == STOPPED:
            print("stopped; the same command resumes it")
            return STOPPED
    print(text_table(table(runs, statuses)))
    return 1 if any(statuses.values()) else 0


def command(run: SweepRun) -> list[str]:
    """What starts a run: one process, or torchrun where it takes several on this machine."""
    own = ["-m", _DOOR, "finetune", *run.overrides]
    devices = run.cfg.trainer.devices
    if devices == 1:
        return [sys.executable, *own]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}", *own]


def _run(arguments: Sequence[str]) -> int:
    """Runs a process to its end. Ctrl-C reaches it by itself; the other signals that ask to stop are passed on."""
    process = subprocess.Popen(arguments)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number in before:
        signal.signal(number, lambda caught, frame: process.send_signal(caught))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(runs: Sequence[SweepRun], statuses: dict[str, int]) -> list[tuple[str, ...]]:
    """A row a run: what it reached, and the figures of its last validation; the first row is the header.

    Args:
        runs: of the sweep.
        statuses: exit status by name.
    """
    found = [_figures(run.cfg.output_dir) for run in runs]
    columns = list(dict.fromkeys(name for figures in found for name in figures))
    rows = [("run", *columns, "")]
    for run, figures in zip(runs, found):
        status = statuses[run.name]
        cells = (_cell(figures.get(name)) for name in columns)
        rows.append((run.name, *cells, f"ended with status {status}" if status else ""))
    return rows


def _figures(folder: str) -> dict[str, Any]:
    """Steps, mean loss of the last tenth of them, median seconds, and the last validation."""
    log = Path(folder) / TRAIN_LOG
    rows = read_train_log(log) if log.is_file() else []
    if not rows:
        return {}
    last = rows[-max(round(_LAST * len(rows)), 1) :]
    figures: dict[str, Any] = {
        "steps": rows[-1]["step"],
        "loss": fmean(row["loss"] for row in last),
        "s/step": median(row["seconds"] for row in rows),
    }
    validation = Path(folder) / VALIDATION_LOG
    validated = read_train_log(validation) if validation.is_file() else []
    if validated:
        numbers = {name: value for name, value in validated[-1].items() if isinstance(value, int | float)}
        figures |= {f"val {name}": value for name, value in numbers.items() if name not in _NOT_FIGURES}
    return figures


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
