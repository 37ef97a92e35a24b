"""Runs of the tiny job with a fault in them, for ``tests.worlds.run_world``; what they say comes back."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from tests.engine.job import run_job


def run_and_tell(job: Any) -> tuple[list[dict[str, Any]], str]:
    """The rows of the step log, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows = run_job(job)
    return rows, printed.getvalue()


def run_on_full_disk(job: Any, step: int, rank: int, what: str = "weights") -> list[dict[str, Any]]:
    """Runs the job; the kernel says ENOSPC to everything that a rank writes at a step of the weights, or ``what``.

    With "torch", the weights are larger than a buffer: then torch hears of it, and says what it says on a full disk.
    """
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from hybridprune_megatron.engine import checkpoint

    save = checkpoint.dist_checkpointing.save

    def fail_as_torch(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    def save_to_full_disk(state: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        if what == "torch" and state["step"] == step:
            filesystem_async._write_item = fail_as_torch
        elif state["step"] == step and dist.get_rank() == rank:
            for name in [f"__{rank}_{number}.distcp" for number in range(8)] if what == "weights" else [what]:
                Path(folder, name).symlink_to("/dev/full")
        return save(state, folder, *args, **kwargs)

    checkpoint.dist_checkpointing.save = save_to_full_disk
    return run_job(job)


def run_with_gate(job: Any, step: int, gate: Path, kill_at: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Runs the job; the background writer of a step waits for a file, which step ``step + 2`` makes.

    Returns:
        The rows, and the steps of the complete checkpoints right before that file was made.
    """
    import time

    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from hybridprune_megatron.config.checkpoint_folder import checkpoint_step, complete_checkpoints
    from hybridprune_megatron.engine import checkpoint
    from hybridprune_megatron.engine.module import HybridPruneModule

    write, save = FileSystemWriterAsync.write_preloaded_data, checkpoint.dist_checkpointing.save
    training_step = HybridPruneModule.training_step
    waits, found, trainer = [False], [], os.getpid()

    def gated_write(*args: Any, **kwargs: Any) -> Any:
        # A writer whose run was killed must not wait forever.
        while waits[0] and not gate.exists() and os.getppid() == trainer:
            time.sleep(0.01)
        return write(*args, **kwargs)

    def gated_save(state: Any, *args: Any, **kwargs: Any) -> Any:
        waits[0] = state["step"] == step
        return save(state, *args, **kwargs)

    def opening_step(self: Any, batches: Any) -> Any:
        result = training_step(self, batches)
        if self.trainer.global_step + 1 == step + 2 and not kill_at:
            found.extend(checkpoint_step(path) for path in complete_checkpoints(gate.parent / "checkpoints"))
            gate.touch()
        return result

    # This process ends with the test.
    FileSystemWriterAsync.write_preloaded_data = staticmethod(gated_write)
    checkpoint.dist_checkpointing.save = gated_save
    HybridPruneModule.training_step = opening_step  # type: ignore[method-assign]
    return run_job(job, kill_at=kill_at), found


def run_with_stderr(job: Any, folder: Path, kill: int, how: int) -> None:
    """Runs the job; rank ``kill`` sends itself the signal ``how`` in step 5. Stderr goes to ``<folder>/<rank>``."""
    import torch.distributed as dist

    from hybridprune_megatron.engine.module import HybridPruneModule

    rank = dist.get_rank()
    os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    training_step = HybridPruneModule.training_step

    def last_step(self: Any, batches: Any) -> Any:
        if self.trainer.global_step + 1 == 5 and rank == kill:
            os.kill(os.getpid(), how)
        return training_step(self, batches)

    HybridPruneModule.training_step = last_step  # type: ignore[method-assign]
    run_job(job)
