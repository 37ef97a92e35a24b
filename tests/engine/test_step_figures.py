"""What a step's row in the log says of memory, speed, operations, budgets and the parts of the loss."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.cost.training import StepCost
from hybridprune_megatron.engine.module import BudgetSampler
from tests.engine.job import run_job
from tests.engine.test_budgets import _write_weights
from tests.engine.tiny import ClipLoader
from tests.models.tiny import tiny_config
from tests.worlds import run_world

_STEPS = 2


def _job(folder: Path, *overrides: str) -> Config:
    settings = ("trainer.max_steps=2", "trainer.global_batch_size=2", "trainer.save_every_n_steps=9")
    return tiny_config(f"output_dir={folder}", *settings, *overrides)


def _rows(job: Config, ranks: int = 1) -> list[dict[str, Any]]:
    return run_world(ranks, run_job, job, 0.0, "", False, True)[0]


def _by_hand(job: Config) -> list[tuple[float, float | None]]:
    """Operations and mean budget of every step, from the batches that the loader gives."""
    batches, found = iter(ClipLoader(0, 1)), []
    drawing = BudgetSampler(job) if job.tuning.budget.distribution != "fixed" else None
    for step in range(1, _STEPS + 1):
        pair = [drawing.assign(batch, step) if drawing else batch for batch in islice(batches, 2)]
        drawn = [budget for batch in pair for budget in batch.budgets or ()]
        mean = sum(drawn) / len(drawn) if drawn else None
        found.append((float(sum(StepCost(job).operations(batch.sizes) for batch in pair)), mean))
    return found


def test_a_plain_run(tmp_path: Path) -> None:
    job = _job(tmp_path / "one")
    rows = _rows(job)
    assert [row["operations"] for row in rows] == [operations for operations, _ in _by_hand(job)]
    for row in rows:
        # Seconds are rounded.
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.01)
        assert row["tflops_per_rank"] == pytest.approx(row["operations"] / row["seconds"] / 1e12, rel=0.01)
        # Python with torch and megatron, and a model of a few thousand weights.
        assert 0.1 < row["resident_memory_gib"] < 8
        # A CPU's peak is not known, nothing was drawn, and the loss has one part.
        assert not row.keys() & {"peak_share", "device_memory_gib", "budget", "answer_loss", "distillation_loss"}


def test_replicas_count_together_what_one_process_counts(tmp_path: Path) -> None:
    drawn = ("tuning.budget.distribution=uniform", "tuning.budget.low=0.4")
    job = _job(tmp_path / "two", *drawn)
    rows = _rows(job, ranks=2)
    for row, (operations, budget) in zip(rows, _by_hand(job), strict=True):
        assert row["operations"] == operations
        assert row["budget"] == pytest.approx(budget)
        assert row["tflops_per_rank"] == pytest.approx(operations / row["seconds"] / 2e12, rel=0.01)
    assert rows[0]["budget"] != rows[1]["budget"]


def test_the_parts_of_the_loss_make_the_loss(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    run_world(1, _write_weights, str(weights))
    settings = ("tuning.distillation.weight=0.3", "tuning.distillation.temperature=1.7", "optim.lr=0.01")
    job = _job(tmp_path / "distilled", *settings, f"model.init_checkpoint={weights}")
    for row in _rows(job):
        assert row["loss"] == pytest.approx(0.7 * row["answer_loss"] + 0.3 * row["distillation_loss"], rel=1e-5)
        assert 0 < row["distillation_loss"] != row["answer_loss"] > 0


def _logged(job: Config) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What MLflow's logger was made with, and what it was given; the package itself is not installed here."""
    from lightning.pytorch import loggers

    made: dict[str, Any] = {}
    rows: list[dict[str, float]] = []

    class Recorded(loggers.Logger):
        name = version = "recorded"

        def __init__(self, **settings: Any) -> None:
            super().__init__()
            made.update(settings)

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append({name: float(value) for name, value in metrics.items()})

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    loggers.MLFlowLogger = Recorded  # type: ignore[misc, assignment]
    run_job(job, 0.0, "", True, True)
    return made, rows


def test_mlflow_gets_every_figure(tmp_path: Path) -> None:
    settings = ("exp_manager.create_mlflow_logger=true", "trainer.log_every_n_steps=1", "name=mine")
    drawn = ("tuning.budget.distribution=uniform", "tuning.budget.low=0.4")
    made, rows = run_world(1, _logged, _job(tmp_path / "run", *settings, *drawn))[0]
    folder = tmp_path / "run"
    assert made == {
        "experiment_name": "mine",
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "artifact_location": f"{folder}/mlruns",
    }
    figures = [row for row in rows if "loss" in row]
    assert len(figures) == _STEPS
    names = {"loss", "lr", "tokens/s", "grad_norm", "budget", "tflops_per_rank", "resident_memory_gib"}
    assert all(names <= row.keys() for row in figures)
