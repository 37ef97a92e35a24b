"""Measures one unit of the study in a process of its own: light finetuning where it is asked for, then evaluations."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.engine.quiet import quiet_libraries
from studies.needles.cells import HEADLINE, METHOD_BY_NAME, Unit

if TYPE_CHECKING:
    from hybridprune_megatron.evaluation.held_out import Question

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "experiment=bench"


@dataclass
class Runner:
    """Measures units; keeps questions and models between them.

    Attributes:
        overrides: of ``experiment=bench``, for every unit.
        samples: held-out questions.
        batch_tokens: length of an evaluation's packed batch before reduction.
        threads: CPU threads.
    """

    overrides: tuple[str, ...]
    samples: int
    batch_tokens: int
    threads: int

    def config(self, unit: Unit, budget: float) -> Config:
        """Configuration of one evaluation."""
        return load_config([*self._overrides(unit, budget)])

    def measure(self, unit: Unit, budgets: tuple[float, ...], emit: Callable[[dict[str, Any]], None]) -> None:
        """Rows of a unit at some budgets, handed out one by one."""
        from hybridprune_megatron.evaluation.accuracy import evaluate
        from hybridprune_megatron.models.build import build_reduction

        model = self._loaded(unit)
        for budget in budgets:
            start = time.perf_counter()
            result = evaluate(model, self._questions, build_reduction(self.config(unit, budget)), self.batch_tokens)
            emit(
                {
                    "key": unit.key(budget),
                    "stage": unit.stage,
                    "method": unit.method,
                    "budget": budget,
                    "seed": unit.seed,
                    "accuracy": result.accuracy,
                    "by_kind": result.by_kind,
                    "mean_retention": result.retention.mean,
                    "correct": "".join(str(int(result.correct[q.sample.key])) for q in self._questions),
                    "evaluation_seconds": round(time.perf_counter() - start, 1),
                }
            )

    def time(self, unit: Unit, budget: float, clips: int, rounds: int) -> tuple[float, float]:
        """Median seconds of a prefill with every token and of one under a unit's method, in turn on the same clips."""
        from hybridprune_megatron.data.batch import pack
        from hybridprune_megatron.models.build import build_reduction
        from studies.demo.prefill import time_prefill

        batch = pack([question.sample for question in self._questions[:clips]])
        candidates = {"full": None, "reduced": build_reduction(self.config(unit, budget))}
        seconds = time_prefill(self._loaded(unit), batch, candidates, rounds).seconds
        return seconds["full"], seconds["reduced"]

    def _overrides(self, unit: Unit, budget: float) -> list[str]:
        if unit.method == "none" or budget == 1.0:
            return [EXPERIMENT, *self.overrides, "reduction=none"]
        method = METHOD_BY_NAME[unit.method]
        budget_override = [] if method.headline_only else [f"reduction.budget={budget}"]
        return [EXPERIMENT, *self.overrides, *method.overrides, *budget_override]

    def _weights(self, unit: Unit) -> Path:
        """The weights of a unit, finetuned first if they are not there."""
        from hybridprune_megatron.config.stored_run import find_checkpoint

        base = self.config(unit, 1.0)
        if not unit.weights:
            assert base.model.init_checkpoint is not None, "the study starts from model.init_checkpoint"
            return Path(base.model.init_checkpoint)
        folder = Path(base.output_dir) / unit.weights
        if not (folder / "done").is_file():
            self._finetune(unit, folder)
            (folder / "done").touch()
        return find_checkpoint(folder)

    def _finetune(self, unit: Unit, folder: Path) -> None:
        """The same recipe that a user runs, in a process of its own; a killed one continues from its checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        budgets = METHOD_BY_NAME[unit.method].tuning if unit.stage == "after" else ()
        command = [
            *(sys.executable, str(ROOT / "recipes" / "finetune.py")),
            *self._overrides(unit, HEADLINE),
            *budgets,
            *(f"name={unit.weights}", f"output_dir={folder}", f"trainer.seed={unit.seed}"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with (folder / "finetune.log").open("w") as log:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            tail = " ".join((folder / "finetune.log").read_text().split()[-40:])
            raise RuntimeError(f"finetuning {unit.weights} ended with code {code}: {tail}")

    def _loaded(self, unit: Unit) -> Any:
        """The model with a unit's weights; precomputed features are refused by any tower but the one that made them."""
        from hybridprune_megatron.engine.weights import load_initial_weights

        weights = self._weights(unit)
        load_initial_weights(self._model, weights)
        return self._model

    @cached_property
    def _questions(self) -> list[Question]:
        from hybridprune_megatron.evaluation.held_out import load_questions

        return load_questions(load_config([EXPERIMENT, *self.overrides, "reduction=none"]), self.samples)

    @cached_property
    def _model(self) -> Any:
        """The model, whose weights every unit overwrites."""
        import torch

        from hybridprune_megatron.engine.launch import Launch
        from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel
        from hybridprune_megatron.models.build import build_model

        torch.set_num_threads(self.threads)
        cfg = load_config([EXPERIMENT, *self.overrides, "reduction=none"])
        init_distributed(Launch())
        init_model_parallel(seed=cfg.trainer.seed)
        return build_model(cfg).eval()


def work(runner: Runner, tasks: Any, results: Any) -> None:
    """A worker process: takes units until it gets None, puts rows, and the unit when it is done or has failed."""
    # A study that is killed takes its workers along.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    quiet_libraries()
    while (task := _next(tasks)) is not None:
        unit, budgets = task
        try:
            runner.measure(unit, budgets, lambda row: results.put(("row", row)))
            results.put(("done", unit))
        except KeyboardInterrupt:
            # The parent got it too, and says so.
            return
        except Exception as error:  # one broken unit must not end the others; the parent counts and names it
            results.put(("failed", (unit, f"{type(error).__name__}: {error}")))


def _next(tasks: Any) -> Any:
    try:
        return tasks.get()
    except KeyboardInterrupt:
        return None


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
