"""Runs a function in a world of processes over gloo, quickly: torch and megatron are imported once, in a forkserver.

Or over nccl, a GPU a process (``run_gpu_world``): each then imports for itself, for a forked process cannot use a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.models.composed import FOLDER
from tests.own_time import HANG_SECONDS

_PRELOAD = [
    "torch",
    "megatron.core",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
    "hybridprune_megatron.engine.module",
    "hybridprune_megatron.models.build",
    "hybridprune_kernels",
    "tests.preload",
]


def _start_context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Without effect once the server runs; a module that cannot be imported is left to the test to report.
    context.set_forkserver_preload(_PRELOAD)
    return context


@functools.cache
def _composed() -> tempfile.TemporaryDirectory[str]:
    """Where the ranks of all worlds of this process leave each other their configurations."""
    return tempfile.TemporaryDirectory(prefix="composed-")


def _worker(
    rank: int, size: int, store: str, composed: str, fn: Callable[..., Any], args: tuple, answers: Connection
) -> None:
    # A group of its own, so that helpers of this process (checkpoint writers) can be ended with it.
    os.setpgid(0, 0)
    # Nor is such a helper to hold the pipe by whose end the test knows that this process is gone.
    os.register_at_fork(after_in_child=answers.close)
    # As every launcher says it: NeMo takes a process without it for rank 0, and two of those tidy up one folder.
    os.environ["RANK"] = str(rank)
    os.environ[FOLDER] = composed
    # Megatron collects garbage at every save and load: not among all that the forkserver has imported.
    gc.freeze()
    try:
        import torch

        from hybridprune_megatron.engine.checkpoint import start_save_helper
        from hybridprune_megatron.engine.launch import Launch
        from hybridprune_megatron.engine.parallel import init_distributed, shut_down

        torch.set_num_threads(1)
        # Numbers of a layout are compared with those of one process: in full float32 on a GPU too.
        torch.backends.cudnn.allow_tf32 = False
        start_save_helper()
        init_distributed(
            Launch(rank, size, rank, size), timeout_minutes=HANG_SECONDS / 60, init_method=f"file://{store}"
        )
        result = fn(*args)
        shut_down()
        answers.send((True, result))
    except BaseException:
        answers.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_world(size: int, fn: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS) -> list[Any]:
    """Calls ``fn(*args)`` on every rank of a fresh world and returns the results by rank.

    ``fn`` is a module-level function; torch.distributed runs already when it is called, megatron's groups do
    not (``init_model_parallel``). Arguments and results are pickled.

    Args:
        size: number of processes.
        fn: what every rank runs.
        *args: its arguments.
        timeout: seconds for the whole world.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if the world did not finish in
            time.
    """
    return _run(_start_context(), size, fn, args, timeout)


def run_gpu_world(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 5 * HANG_SECONDS) -> list[Any]:
    """``run_world`` over nccl, on the first ``size`` GPUs; arguments, results and errors as there."""
    return _run(multiprocessing.get_context("spawn"), size, fn, args, timeout)


def _run(context: Any, size: int, fn: Callable[..., Any], args: tuple, timeout: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        ends, workers = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            about = (rank, size, str(Path(folder) / "store"), _composed().name)
            worker = context.Process(target=_worker, args=(*about, fn, args, there))
            worker.start()
            there.close()
            ends.append(here)
            workers.append(worker)
        try:
            return _collect(ends, timeout)
        finally:
            for worker in workers:
                worker.join(5)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
                # Helpers of a killed rank outlive it; no such group means that there are none.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)


def _collect(ends: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(
                f"ranks {[r for r in range(len(ends)) if r not in results]} did not finish in {timeout} s"
            )
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]  # wait() returns what it was given
            try:
                fine, result = end.recv()  # type: ignore[union-attr]  # a Connection, as above
            except EOFError:
                fine, result = False, "the process died without an error message (killed, or crashed below Python)"
            # Raised at once: the other ranks may be waiting for the failed one.
            assert fine, f"rank {rank} of {len(ends)}:\n{result}"
            results[rank] = result
    return [results[rank] for rank in range(len(ends))]
