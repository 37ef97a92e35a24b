"""A job that is asked to stop saves the step it is at, everywhere the same, and continues bitwise."""

from __future__ import annotations

import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.engine.preemption import STOPPED
from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world


def _run_and_ask(job: Any, rank: int, step: int, asked_by: signal.Signals) -> Any:
    """Runs the job; one rank gets the signal in the middle of a step. Returns the exit status."""
    import torch.distributed as dist

    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.preemption import hold_stop_signals

    hold_stop_signals()
    training_step = HybridPruneModule.training_step

    def asked_step(self: Any, dataloader_iter: Any) -> Any:
        if dist.get_rank() == rank and self.trainer.global_step + 1 == step:
            # To this thread: those of the world's gloo are older than the mask, as none is in a job.
            signal.pthread_kill(threading.get_ident(), asked_by)
        return training_step(self, dataloader_iter)

    # This process ends with the test.
    HybridPruneModule.training_step = asked_step  # type: ignore[method-assign]
    try:
        run_job(job)
    except SystemExit as stop:
        return stop.code
    return 0


def _digits(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), row["samples"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    return _digits(run_world(2, run_job, tiny_job(tmp_path_factory.mktemp("whole")))[0])


@pytest.mark.parametrize(("rank", "asked_by"), [(1, signal.SIGTERM), (0, signal.SIGUSR1)])
def test_all_ranks_stop_at_the_step_of_the_one_that_is_asked(
    tmp_path: Path, undisturbed: list[tuple], rank: int, asked_by: signal.Signals
) -> None:
    job = tiny_job(tmp_path, save_every_n_steps=100)
    assert run_world(2, _run_and_ask, job, rank, 5, asked_by) == [STOPPED, STOPPED]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert len((tmp_path / "train_log.jsonl").read_text().splitlines()) == 5
    assert _digits(run_world(2, run_job, job)[0]) == undisturbed


def test_a_job_asked_in_its_last_step_is_done(tmp_path: Path, undisturbed: list[tuple]) -> None:
    job = tiny_job(tmp_path)
    assert run_world(2, _run_and_ask, job, 0, 8, signal.SIGTERM) == [0, 0]
    assert len((tmp_path / "train_log.jsonl").read_text().splitlines()) == 8


def _loader_process_under_signals() -> tuple[list[int], int | None]:
    from torch.utils.data import DataLoader

    from hybridprune_megatron.data.worker_signals import obey_parent_only
    from hybridprune_megatron.engine.preemption import hold_stop_signals, stop_requested

    hold_stop_signals()
    loader = DataLoader(
        range(1000),  # type: ignore[arg-type]  # anything with a length and items will do
        batch_size=None,
        num_workers=1,
        worker_init_fn=partial(obey_parent_only, None),
        multiprocessing_context="fork",
    )
    items = iter(loader)
    first = next(items)
    worker = items._workers[0]  # type: ignore[attr-defined]
    for name in ("TERM", "USR1"):
        # kill(1) is not the worker's parent.
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # More than the worker can have had ready.
    some = [first, *(next(items) for _ in range(20))]
    assert worker.is_alive()
    assert not stop_requested()
    worker.terminate()
    worker.join(60)
    return some, worker.exitcode


def test_loader_process_lives_through_the_clusters_signals_and_ends_by_its_parents() -> None:
    assert run_world(1, _loader_process_under_signals) == [(list(range(21)), 0)]
