"""Lightning callbacks of a run: atomic checkpoints, stopping on a signal, and a progress bar.

Why not NeMo's checkpoint callback (``exp_manager.create_checkpoint_callback`` is false): it writes in place
and marks a checkpoint as unfinished by a file beside it; killed while it writes the only "-last" checkpoint,
it refuses to resume and asks for the folder to be removed by hand. Ours are renamed into place when complete,
and the newest complete one is found by its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from tqdm import tqdm

from hybridprune_megatron.config.checkpoint_folder import checkpoint_name
from hybridprune_megatron.engine.module import HybridPruneModule
from hybridprune_megatron.engine.preemption import STOPPED, stop_requested
from hybridprune_megatron.engine.strategy import MegatronStrategy


def _strategy(trainer: Trainer) -> MegatronStrategy:
    assert isinstance(trainer.strategy, MegatronStrategy), type(trainer.strategy)
    return trainer.strategy


class StepCheckpoint(Checkpoint):
    """Saves every n steps and at the end of training, into ``directory/step_<n>``."""

    def __init__(self, directory: Path, every_n_steps: int) -> None:
        """Args: directory: the run's checkpoint folder. every_n_steps: steps between two checkpoints."""
        self._directory = directory
        self._every = every_n_steps
        self._saved_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clears what killed runs left."""
        _strategy(trainer).remove_incomplete(self._directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run stands on a saved step."""
        self._saved_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves the step before this one, and completes a save that is written by now.

        Not in on_train_batch_end: there Lightning has counted the optimizer step but not yet the batch, and a
        resumed run would start with its counters one apart.
        """
        if trainer.global_step % self._every == 0:
            self.save(trainer)
        _strategy(trainer).finish_save(wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self.save(trainer)
        _strategy(trainer).finish_save(wait=True)

    def save(self, trainer: Trainer) -> None:
        """Saves now, unless this step is saved already."""
        if trainer.global_step != self._saved_at:
            self._saved_at = trainer.global_step
            trainer.save_checkpoint(self._directory / checkpoint_name(trainer.global_step))

    # NeMo's StatelessTimer (exp_manager.max_time_per_run) saves through these two names of Lightning's own
    # callback.

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Any]:
        return {}

    def _save_last_checkpoint(self, trainer: Trainer, candidates: dict[str, Any]) -> None:
        self.save(trainer)


class StopOnSignal(Callback):
    """Saves as at the end of training and ends the job before the next step, once any rank was asked to stop
    (``engine.preemption``).

    Not NeMo's preemption callback: it exists on GPUs only, asks rank 0 only, and exits with 0 as a finished run does.
    """

    def __init__(self, checkpoints: StepCheckpoint) -> None:
        """Args: checkpoints: saves."""
        self._checkpoints = checkpoints

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends the process with ``STOPPED``, on all ranks before the same step."""
        asked = torch.tensor(int(stop_requested()), device=trainer.strategy.root_device)
        # The signal reaches ranks at different times; one that stops alone leaves the others waiting for it.
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if not asked:
            return
        self._checkpoints.on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            print(f"asked to stop: saved after step {trainer.global_step}, exit status {STOPPED}", flush=True)
        raise SystemExit(STOPPED)


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar, over the steps of the run instead of an epoch's batches; loss, learning rate, tokens/s."""

    def __init__(self) -> None:
        super().__init__()
        # Until training starts, so that an earlier exception finds one to close.
        self.train_progress_bar = tqdm(disable=True)

    def init_train_tqdm(self) -> tqdm:
        """Starts at the step the run stands at."""
        total, done = self.trainer.max_steps, self.trainer.global_step
        return tqdm(total=total, initial=done, desc="train", unit="step", disable=self.is_disabled, dynamic_ncols=True)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """The bar does not begin anew."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar one step."""
        # Not get_metrics: those are of the step before, Lightning updates them after this hook.
        assert isinstance(pl_module, HybridPruneModule), type(pl_module)
        forms = {"loss": ".4f", "lr": ".2e", "tokens/s": ".0f"}
        shown = {name: format(value, forms[name]) for name, value in pl_module.shown.items()}
        self.train_progress_bar.set_postfix(shown, refresh=False)
        self.train_progress_bar.update(1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the bar shows stays."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the bar's line, so that the error starts on its own."""
        self.train_progress_bar.close()
