"""The LightningModule of a run: a model, a loader, and megatron's training step between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from hybridprune_megatron.engine.optimization import ModelChunks, TrainState, build_train_state, micro_batches_per_step
from hybridprune_megatron.engine.parallel import data_rank, seed_generators
from hybridprune_megatron.engine.rng_state import restore_rng_state
from hybridprune_megatron.engine.train_log import TRAIN_LOG, TrainLog
from hybridprune_megatron.engine.train_step import StepResult, train_step
from hybridprune_megatron.engine.weights import load_initial_weights
from hybridprune_megatron.method.budgets import budget_levels, draw_budget
from hybridprune_megatron.models.distillation import DistillingModel

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.data.batch import PackedBatch
    from hybridprune_megatron.data.task_encoder import TrainLoader
    from hybridprune_megatron.method.counts import PackSizes


class BudgetSampler:
    """Draws a budget for every sample and looks its schedule up; holds no state but solved schedules.

    Args:
        cfg: uses ``tuning.budget``, ``trainer.seed``, and what the schedules are solved from.
    """

    def __init__(self, cfg: Config) -> None:
        budget = cfg.tuning.budget
        self._levels = budget_levels(budget.distribution, budget.low, budget.high, budget.choices)
        self._retention = {level: cfg.retention_at(level) for level in self._levels}
        self._per_sample = budget.per == "sample"
        self._seed = cfg.trainer.seed

    def assign(self, batch: PackedBatch, step: int) -> PackedBatch:
        """The batch with a retention for every sample.

        Args:
            batch: samples with the same key in the same step get the same budget.
            step: of the optimizer, from 1.
        """
        keys = batch.keys if self._per_sample else [""] * len(batch.keys)
        budgets = [draw_budget(self._levels, self._seed, step, key) for key in keys]
        retention = tuple(self._retention[budget] for budget in budgets)
        return replace(batch, retention=retention, budgets=tuple(budgets))


#: A single bad batch is skipped; a model that has diverged must not run on until the job's time is up.
_MAX_SKIPPED_IN_A_ROW = 10

#: (pre_process, post_process[, chunk of an interleaved stage]) -> the model, or this part of it, with frozen parameters
#: marked.
ModelFactory = Callable[..., MegatronModule]
#: (data-parallel rank, number of data-parallel ranks) -> this rank's loader.
LoaderFactory = Callable[[int, int], "TrainLoader"]


class Costs(Protocol):
    """The cost model of a run; see ``cost.training.StepCost``."""

    def operations(self, sizes: PackSizes) -> int:
        """Of forward and backward over a packed sequence."""

    def peak(self, device: str) -> float | None:
        """Operations a second that a device of a name can do at most; None: not known."""


class HybridPruneModule(LightningModule):
    """Ties a model and its data to Lightning. The optimizer is megatron's, so Lightning's own optimization is
    off.

    The strategy builds and owns the processes; see
    :class:`~hybridprune_megatron.engine.strategy.MegatronStrategy`.

    Attributes:
        cfg: the run's configuration (``trainer``, ``optim``, ``parallel``, ``tuning``, ``model.init_checkpoint``
            are read).
        state: model, optimizer and schedule once the strategy has set up; for evaluation after the run too.
        loader: this rank's loader once training starts.
        consumed_samples: packed sequences consumed by the whole job.
        shown: of the last step, for the progress bar.
        best: the validation whose checkpoint stays, {"figure", "step", "value"}; None: there is none.
    """

    state: TrainState

    def __init__(
        self,
        cfg: Config,
        model_factory: ModelFactory,
        loader_factory: LoaderFactory,
        log_path: Path | None = None,
        costs: Costs | None = None,
    ) -> None:
        """Nothing is built yet.

        Args:
            model_factory: called once (in an interleaved pipeline once a chunk), after megatron's groups exist.
            loader_factory: called once, after that.
            log_path: where the step log goes; default ``<output_dir>/train_log.jsonl``.
            costs: counts operations for the log; None: it has none.
        """
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
        self._model_factory = model_factory
        self._loader_factory = loader_factory
        self._budgets = BudgetSampler(cfg) if cfg.tuning.budget.distribution != "fixed" else None
        self._log_path = log_path or Path(cfg.output_dir) / TRAIN_LOG
        self._log: TrainLog | None = None
        self._costs = costs
        self._peak: float | None = None
        self._resumed: dict[str, Any] | None = None
        self.loader: TrainLoader | None = None
        self.consumed_samples = 0
        self.shown: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self._skipped_in_a_row = 0

    def build(self, device: torch.device) -> None:
        """Builds and wraps the model; called by the strategy when megatron's groups exist."""
        module = self.build_stage()
        if self.cfg.model.init_checkpoint:
            load_initial_weights(module, self.cfg.model.init_checkpoint, self.cfg.model)
        self.state = build_train_state(module, self.cfg.optim, self.cfg.trainer, self.cfg.parallel, device)
        distillation = self.cfg.tuning.distillation
        if distillation.weight and distillation.teacher == "initial":
            # Here, where weights have their place and dtype, and before a checkpoint overwrites them.
            assert isinstance(module, DistillingModel), type(module)
            module.keep_initial_weights()
        self._num_microbatches = micro_batches_per_step(self.cfg.trainer.global_batch_size)
        if self._costs is not None and device.type == "cuda":
            self._peak = self._costs.peak(torch.cuda.get_device_name(device))

    def build_stage(self) -> MegatronModule:
        """This stage of the model, or the chunks that it holds."""
        chunks = self.cfg.parallel.virtual_pipeline
        if chunks == 1:
            first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
            return self._model_factory(first, last)
        return ModelChunks(
            [
                self._model_factory(
                    parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                    parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                    chunk,
                )
                for chunk in range(chunks)
            ]
        )

    def resume_from(self, loaded: dict[str, Any]) -> None:
        """Keeps what a checkpoint holds beside the weights until the loader exists; called by the strategy."""
        self._resumed = loaded

    def configure_optimizers(self) -> None:
        """None for Lightning: megatron's optimizer lives in ``state``."""

    def train_dataloader(self) -> TrainLoader:
        """This rank's loader, put back to the checkpoint's state in a resumed run."""
        where = data_rank()
        self.loader = self._loader_factory(where.rank, where.size)
        if self._resumed is not None:
            self.loader.load_state(self._resumed["loader"])
        return self.loader

    def on_train_start(self) -> None:
        """Last moment before the first step: generators and step log."""
        step = self.trainer.global_step
        self.consumed_samples = step * self.cfg.trainer.global_batch_size
        if self.trainer.is_global_zero:
            self._log = TrainLog(self._log_path)
            self._log.truncate_after(step)
        if self._resumed is None:
            return
        if self._resumed["rng"] is not None:
            restore_rng_state(self._resumed["rng"])
        else:
            # Another layout has other generators: new ones, and not those of the run's first steps again.
            seed_generators(self.cfg.trainer.seed + step)
        self._resumed = None

    def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:
        """One optimizer step over a global batch; returns the mean loss per token (0-dim, detached).

        The parameter's name tells Lightning to hand over the iterator: a step takes several micro batches.
        """
        start = time.perf_counter()
        step = self.trainer.global_step + 1
        # Lightning yields (batch, index, loader index).
        batches = (self._with_budgets(item[0], step) for item in dataloader_iter)
        result = train_step(
            self.state,
            batches,
            self._num_microbatches,
            self.cfg.data.sequence_length,
            step,
            self.cfg.trainer.nonfinite,
            None if self._costs is None else self._costs.operations,
        )
        self._count_skipped(result)
        # Lightning counts steps by its own optimizers, of which there are none; the count ends the run and
        # names checkpoints.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.consumed_samples += self.cfg.trainer.global_batch_size
        self._record(step, result, time.perf_counter() - start)
        return torch.tensor(result.loss)

    def _count_skipped(self, result: StepResult) -> None:
        """Says which update was left out; ends the run when it does nothing else any more."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{_MAX_SKIPPED_IN_A_ROW} updates in a row left out (trainer.nonfinite=skip), so it is not single "
                f"samples; {result.skipped}; lower optim.lr or start again from an earlier checkpoint"
            )
        if result.skipped and self.trainer.is_global_zero:
            print(f"update left out: {result.skipped}", flush=True)

    def _with_budgets(self, batch: PackedBatch, step: int) -> PackedBatch:
        return batch if self._budgets is None else self._budgets.assign(batch, step)

    def _record(self, step: int, result: StepResult, seconds: float) -> None:
        """Writes the step to log, loggers and progress bar; ``seconds`` counts data and compute, not saving."""
        # In place of a figure that is not known there is none.
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        memory = "device_memory_gib" if on_gpu else "resident_memory_gib"
        more = {memory: round(result.memory / 2**30, 3)}
        if result.operations:
            per_rank = result.operations / seconds / dist.get_world_size()
            more["tflops_per_rank"] = per_rank / 1e12
            if self._peak is not None:
                more["peak_share"] = per_rank / self._peak
        if result.budget is not None:
            more["budget"] = result.budget
        if result.parts is not None:
            more["answer_loss"], more["distillation_loss"] = result.parts
        tokens_per_second = result.tokens / seconds
        if self._log is not None:
            row: dict[str, Any] = {"step": step, "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm}
            row |= {"tokens": result.tokens, "loss_tokens": result.loss_tokens}
            row |= {"seconds": round(seconds, 4), "tokens_per_second": round(tokens_per_second, 2)}
            row |= {"operations": result.operations} if result.operations else {}
            row |= more | {"samples": result.samples}
            row |= {"skipped": result.skipped} if result.skipped else {}
            self._log.append(row)
        # batch_size is given because Lightning cannot see it behind an iterator.
        self.shown = {"loss": result.loss, "lr": result.lr, "tokens/s": tokens_per_second}
        logged = self.shown | more
        shown_as = {memory: "GiB", "tflops_per_rank": "TFLOP/s", "peak_share": "of peak", "budget": "budget"}
        self.shown |= {short: more[name] for name, short in shown_as.items() if name in more}
        self.log_dict(
            {
                **logged,
                "grad_norm": result.grad_norm,
                "loss_tokens": float(result.loss_tokens),
                "tokens_spread": result.spread,
            },
            batch_size=1,
        )
