"""Copies of a run's checkpoints on another disk, made by rank 0 in the background; nothing waits but the run's end.

A copy appears in one move, as a checkpoint does. What goes wrong there is told and counted, and never ends the run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

from hybridprune_megatron.config.checkpoint_folder import (
    INCOMPLETE,
    checkpoint_step,
    damage,
    outdated_checkpoints,
    own_copies,
)
from hybridprune_megatron.engine.disk import retire, sync_entry, sync_tree


class SecondPlace:
    """Copies checkpoints one after another; a newer one takes the place of one that waits.

    Args:
        folder: where to; made if the folder it lies in is there, so that a disk that is not mounted is noticed.
        output_dir: of the run, which tells its copies from those of other runs.
        keep_last: copies that stay, the newest included.
        keep_every_n_steps: copies of multiples of it stay too; 0: of none.

    Attributes:
        made: copies so far.
        failed: copies that could not be made.
    """

    def __init__(self, folder: Path, output_dir: str, keep_last: int, keep_every_n_steps: int) -> None:
        self.made = self.failed = 0
        self._folder, self._output_dir = folder, output_dir
        self._keep_last, self._keep_every = keep_last, keep_every_n_steps
        self._mine = hashlib.sha256(output_dir.encode()).hexdigest()[:8]
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int | None] | None = None
        self._copying: Path | None = None
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def held(self) -> set[Path]:
        """Checkpoints that are being copied or wait for it; they must not be removed yet."""
        with self._changed:
            return {path for path in (self._copying, self._waiting[0] if self._waiting else None) if path is not None}

    def copy(self, checkpoint: Path, best: int | None = None) -> None:
        """Asks for a copy, unless there is one.

        Args:
            checkpoint: a whole one.
            best: step whose copy stays as well.
        """
        with self._changed:
            self._waiting = (checkpoint, best)
            self._changed.notify_all()

    def finish(self) -> None:
        """Waits for the copies that were asked for, and says how many there are if some are missing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._copying is None)
        if self.failed:
            print(f"copies of checkpoints in {self._folder}: {self.made} made, {self.failed} failed", flush=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                assert self._waiting is not None
                (checkpoint, best), self._waiting = self._waiting, None
                self._copying = checkpoint
            try:
                self._copy(checkpoint, best)
            except OSError as error:
                self._warn(checkpoint, error.strerror or str(error))
            except Exception as error:
                # The run continues, whatever a second disk does.
                self._warn(checkpoint, f"{type(error).__name__}: {error}")
            with self._changed:
                self._copying = None
                self._changed.notify_all()

    def _warn(self, checkpoint: Path, reason: str) -> None:
        self.failed += 1
        where = f"trainer.copy_checkpoints_to={self._folder}"
        reason = " ".join(reason.split())
        print(f"{checkpoint.name} is not copied to {where} ({reason}); failed so far: {self.failed}", flush=True)

    def _copy(self, checkpoint: Path, best: int | None) -> None:
        self._folder.mkdir(exist_ok=True)
        for left in self._folder.glob(f"*.{self._mine}{INCOMPLETE}"):
            shutil.rmtree(left, ignore_errors=True)
        own = {path.name: path for path in own_copies(self._folder, self._output_dir)}
        final = self._folder / checkpoint.name
        if final.name in own and (final / "run.json").read_bytes() == (checkpoint / "run.json").read_bytes():
            return
        if os.path.lexists(final) and final.name not in own:
            raise OSError("another run's checkpoint, or a damaged one, has that name there")
        scratch = self._folder / f"{checkpoint.name}.{self._mine}{INCOMPLETE}"
        try:
            shutil.copytree(checkpoint, scratch)
            what = damage(scratch)
            if what is not None:
                raise OSError(f"the copy is damaged: {what}")
            sync_tree(scratch)
            if final.name in own:
                retire(final, f".{self._mine}")
            scratch.rename(final)
            sync_entry(self._folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self.made += 1
        steps = {checkpoint_step(path) for path in own_copies(self._folder, self._output_dir)}
        for old in outdated_checkpoints(self._folder, steps, self._keep_last, self._keep_every, best):
            retire(old, f".{self._mine}")
