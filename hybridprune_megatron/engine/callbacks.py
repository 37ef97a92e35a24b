"""Lightning callbacks of a run: atomic checkpoints, stopping on a signal, validation, and a progress bar.

Why not NeMo's checkpoint callback (``exp_manager.create_checkpoint_callback`` is false): it writes in place
and marks a checkpoint as unfinished by a file beside it; killed while it writes the only "-last" checkpoint,
it refuses to resume and asks for the folder to be removed by hand. Ours are renamed into place when complete,
and the newest complete one is found by its name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from tqdm import tqdm

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.checkpoint_folder import checkpoint_name
from hybridprune_megatron.engine.module import HybridPruneModule
from hybridprune_megatron.engine.preemption import STOPPED, stop_requested
from hybridprune_megatron.engine.strategy import MegatronStrategy
from hybridprune_megatron.engine.train_log import VALIDATION_LOG, TrainLog
from hybridprune_megatron.engine.validation import Samples, Validator

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config


def _strategy(trainer: Trainer) -> MegatronStrategy:
    assert isinstance(trainer.strategy, MegatronStrategy), type(trainer.strategy)
    return trainer.strategy


class StepCheckpoint(Checkpoint):
    """Saves every n steps, at the best validation so far and at the end of training, into ``directory/step_<n>``."""

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
        assert isinstance(pl_module, HybridPruneModule), type(pl_module)
        is_best = pl_module.best is not None and pl_module.best["step"] == trainer.global_step
        if trainer.global_step % self._every == 0 or is_best:
            self.save(trainer)
        _strategy(trainer).finish_save(wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step, and waits for its copy if there is a second place."""
        self.save_last(trainer)
        _strategy(trainer).finish_copies()

    def save_last(self, trainer: Trainer) -> None:
        """Saves this step, and waits until the checkpoint is whole."""
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


def asked_to_stop(trainer: Trainer) -> bool:
    """Whether any rank was; every rank calls it.

    The signal reaches ranks at different times, and one that stops alone leaves the others waiting for it.
    """
    asked = torch.tensor(int(stop_requested()), device=trainer.strategy.root_device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked)


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
        if not asked_to_stop(trainer):
            return
        # Its copy is made when the run continues: time is short.
        self._checkpoints.save_last(trainer)
        if trainer.is_global_zero:
            print(f"asked to stop: saved after step {trainer.global_step}, exit status {STOPPED}", flush=True)
        raise SystemExit(STOPPED)


class Validation(Callback):
    """Validates every n steps and after the last, looks for the best, and ends a run that gets no better.

    Right after the optimizer step, so that a checkpoint of this step knows of it. A job that is asked to stop saves at
    once, and validates when it is resumed.
    """

    def __init__(self, cfg: Config, held_out: Callable[[], Samples]) -> None:
        """Args: cfg: with ``validation_steps`` above 0. held_out: called once, before the first step."""
        self._cfg = cfg
        self._held_out = held_out
        self._figure = cfg.trainer.keep_best or "loss"
        self._log = TrainLog(Path(cfg.output_dir) / VALIDATION_LOG)
        self._validator: Validator | None = None
        self._validated_at = 0
        self._best: dict[str, Any] | None = None
        self._waited = 0

    @property
    def _measured_on(self) -> list[Any]:
        """What figures of two validations must share to be compared."""
        return [self._figure, self._cfg.data.validation, self._cfg.trainer.eval_samples]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        found = {"step": self._validated_at, "best": self._best, "waited": self._waited}
        return {**found, "measured_on": self._measured_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the search for the best, unless it is measured otherwise now."""
        self._validated_at = state_dict["step"]
        if state_dict["measured_on"] == self._measured_on:
            self._best, self._waited = state_dict["best"], state_dict["waited"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the validations, so that what cannot be done is said before the first step."""
        assert isinstance(pl_module, HybridPruneModule), type(pl_module)
        self._validator = Validator(self._held_out(), self._cfg.data.sequence_length, self._cfg.drops)
        if self._figure.startswith("accuracy") and not self._validator.knows_answers:
            reason = "no sample of data.validation says under meta which answer is right"
            raise fail("trainer.keep_best", self._figure, reason, "set trainer.keep_best=loss, or add answers")
        step = trainer.global_step
        if trainer.is_global_zero:
            self._log.truncate_after(step)
        self._tell(pl_module)
        if step and step % self._cfg.validation_steps == 0 and self._validated_at != step:
            self._validate(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self._gave_up

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validates if this step is one to do so."""
        assert isinstance(pl_module, HybridPruneModule), type(pl_module)
        last = trainer.global_step >= self._cfg.trainer.max_steps
        due = last or trainer.global_step % self._cfg.validation_steps == 0
        if due and (last or not asked_to_stop(trainer)):
            self._validate(trainer, pl_module)
            trainer.should_stop = trainer.should_stop or self._gave_up

    @property
    def _gave_up(self) -> bool:
        return 0 < self._cfg.trainer.early_stopping <= self._waited

    def _validate(self, trainer: Trainer, pl_module: HybridPruneModule) -> None:
        assert self._validator is not None, "before on_train_start"
        start, step = time.perf_counter(), trainer.global_step
        found = self._validator.measure(pl_module.state)
        seconds = round(time.perf_counter() - start, 2)
        is_best = self._compare(step, found[self._figure])
        self._validated_at = step
        self._tell(pl_module)
        if not trainer.is_global_zero:
            return
        self._log.append({"step": step, **found, "seconds": seconds})
        for logger in trainer.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in found.items()}, step)
        best = f", best {self._figure} so far" if is_best else ""
        tqdm.write(f"step {step}: {validation_line(found)}, {seconds:.1f} s{best}")
        if self._gave_up:
            tqdm.write(f"no better {self._figure} in {self._waited} validations (trainer.early_stopping): the run ends")

    def _compare(self, step: int, value: float) -> bool:
        """Takes note of a figure; whether it is the best so far. What is not a number never is."""
        sign = 1 if self._figure.startswith("accuracy") else -1
        better = math.isfinite(value) and (self._best is None or sign * value > sign * self._best["value"])
        self._waited = 0 if better else self._waited + 1
        if better:
            self._best = {"figure": self._figure, "step": step, "value": value}
        return better

    def _tell(self, pl_module: HybridPruneModule) -> None:
        pl_module.best = self._best if self._cfg.trainer.keep_best else None


def validation_line(found: Mapping[str, float]) -> str:
    """Figures of a validation in words.

    Args:
        found: from ``Validator.measure``.
    """
    words = []
    for name, form in (("loss", "{:.4f}"), ("accuracy", "{:.1%}")):
        if name in found:
            full = f" ({form.format(found[f'{name}_full'])} with every token)" if f"{name}_full" in found else ""
            words.append(f"{name} {form.format(found[name])}{full}")
    return f"validation {', '.join(words)} on {found['samples']:.0f} samples"


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
        forms = {"loss": ".4f", "lr": ".2e", "tokens/s": ".0f", "GiB": ".1f", "TFLOP/s": ".3g", "of peak": ".0%"}
        forms["budget"] = ".2f"
        shown = {name: format(value, forms[name]) for name, value in pl_module.shown.items()}
        self.train_progress_bar.set_postfix(shown, refresh=False)
        self.train_progress_bar.update(1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the bar shows stays."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the bar's line, so that the error starts on its own."""
        self.train_progress_bar.close()
