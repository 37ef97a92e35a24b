"""Killed 20 times at random moments, a run ends with the digits of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world

_KILLS, _STEPS = 20, 60


Rows = list[dict[str, Any]]


def _run(job: Any, in_save: bool | None, count: int, share: float, seconds: float) -> tuple[Rows, float]:
    """Runs the job, and kills this process by SIGKILL from another thread, whatever it does then.

    Args:
        job: what to train.
        in_save: count saves of this start, or steps; None: nobody is killed.
        count: saves or steps before the one in which the kill comes.
        share: of ``seconds`` (a save) or of the time of the step before (a step), when it comes.
        seconds: how long a save takes.

    Returns:
        The rows of the step log, and the longest time that a save took.
    """
    from hybridprune_megatron.engine.checkpoint import CheckpointSaver
    from hybridprune_megatron.engine.module import HybridPruneModule

    save, training_step = CheckpointSaver.save, HybridPruneModule.training_step
    saves: list[float] = []
    steps = [0.01]

    def kill_in(delay: float) -> None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def timed_save(self: Any, *args: Any) -> Path:
        if in_save is True and len(saves) == count:
            kill_in(share * seconds)
        began = time.perf_counter()
        path = save(self, *args)
        if in_save is True and len(saves) == count:
            # Done before the timer: then it ends right behind the save.
            os.kill(os.getpid(), signal.SIGKILL)
        saves.append(time.perf_counter() - began)
        return path

    def timed_step(self: Any, batches: Any) -> Any:
        if in_save is False and len(steps) - 1 == count:
            kill_in(share * steps[-1])
        began = time.perf_counter()
        result = training_step(self, batches)
        if in_save is False and len(steps) - 1 == count:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(time.perf_counter() - began)
        return result

    # This process ends with the test.
    CheckpointSaver.save, HybridPruneModule.training_step = timed_save, timed_step  # type: ignore[method-assign]
    return run_job(job), max(saves)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    whole, seconds = run_world(1, _run, _job(tmp_path / "whole"), None, 0, 0.0, 0.0)[0]
    draw = random.Random(20)
    for kill in range(_KILLS):
        # Every second one while a checkpoint is written, half of those in the background.
        in_save = kill % 2 == 0
        job = _job(tmp_path / "killed", async_save=kill % 4 == 0)
        count = draw.randint(0, 1) if in_save else draw.randint(0, 4)
        with pytest.raises(AssertionError, match="died without an error message"):
            run_world(1, _run, job, in_save, count, draw.uniform(0, 1.2), seconds)
    rows, _ = run_world(1, _run, _job(tmp_path / "killed"), None, 0, 0.0, 0.0)[0]
    assert len(rows) == _STEPS
    assert _digits(rows) == _digits(whole)


def _job(folder: Path, **trainer: Any) -> Any:
    return tiny_job(folder, max_steps=_STEPS, save_every_n_steps=3, **trainer)


def _digits(rows: Rows) -> list[tuple[Any, ...]]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), repr(row["lr"]), row["samples"]) for row in rows]
