"""Validation while training: it changes nothing, is remembered, and says which checkpoints stay and when a run ends."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.schema import ParallelConfig
from hybridprune_megatron.engine.preemption import STOPPED
from hybridprune_megatron.engine.train_log import read_train_log
from tests.engine.job import Job, run_job, tiny_job
from tests.engine.test_budgets import _job as everything_job
from tests.engine.test_budgets import _write_weights as write_weights
from tests.engine.test_preemption import _run_and_ask as run_and_ask
from tests.worlds import run_world

_KILLED = "died without an error message"


def _digits(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), repr(row["lr"]), row["samples"]) for row in rows]


def _validated(folder: Path) -> list[dict[str, Any]]:
    """The validations of a run, without their seconds."""
    rows = read_train_log(folder / "validation_log.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


def _validating(folder: Path, **trainer: Any) -> Job:
    return tiny_job(folder, **({"eval_samples": 5, "eval_every_n_steps": 2} | trainer))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Training without validation, under dropout."""
    return _digits(run_world(1, run_job, tiny_job(tmp_path_factory.mktemp("plain")))[0])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple], list[dict[str, Any]]]:
    """Training with validation, and its validations."""
    folder = tmp_path_factory.mktemp("watched")
    return _digits(run_world(1, run_job, _validating(folder))[0]), _validated(folder)


def test_training_is_bitwise_the_same_with_validation(plain: list[tuple], watched: Any) -> None:
    digits, rows = watched
    assert digits == plain
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {row["samples"] for row in rows} == {5}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert "loss_full" not in rows[0], "nothing is dropped: one pass is both"


@pytest.mark.parametrize("kill_at", ["step:5", "save:6"])
def test_a_killed_run_goes_on_digit_for_digit_and_validates_what_it_would_have(
    tmp_path: Path, watched: Any, kill_at: str
) -> None:
    with pytest.raises(AssertionError, match=_KILLED):
        run_world(1, run_job, _validating(tmp_path), 0.1, kill_at)
    assert _digits(run_world(1, run_job, _validating(tmp_path))[0]) == watched[0]
    assert _validated(tmp_path) == watched[1]


def test_a_job_that_is_asked_to_stop_saves_first_and_validates_when_it_goes_on(tmp_path: Path, watched: Any) -> None:
    job = _validating(tmp_path, save_every_n_steps=100)
    assert run_world(1, run_and_ask, job, 0, 4, signal.SIGTERM) == [STOPPED]
    assert [row["step"] for row in _validated(tmp_path)] == [2]
    assert _digits(run_world(1, run_job, job)[0]) == watched[0]
    assert _validated(tmp_path) == watched[1]


def test_all_of_finetuning_is_bitwise_the_same_with_validation(tmp_path: Path) -> None:
    """Adapters with dropout, a teacher and drawn budgets; the validation drops at the configured budget."""
    run_world(1, write_weights, str(tmp_path / "weights.safetensors"))
    plain = run_world(1, run_job, everything_job(tmp_path / "plain"), 0.0, "", False, True)[0]
    settings = ("data.validation=held_out", "trainer.eval_samples=5", "trainer.eval_every_n_steps=2")
    watched = run_world(1, run_job, everything_job(tmp_path / "watched", *settings), 0.0, "", False, True)[0]
    assert _digits(watched) == _digits(plain)
    rows = _validated(tmp_path / "watched")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(row["loss"] != row["loss_full"] and "accuracy_full" in row for row in rows)


def test_replicas_that_gather_parameters_late_train_the_same_with_validation(tmp_path: Path) -> None:
    found = {}
    for samples in (0, 5):
        job = _validating(tmp_path / str(samples), eval_samples=samples, max_steps=5)
        job.parallel = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
        ranks = run_world(2, run_job, job, 0.1, "", True)
        assert ranks[0] == ranks[1]
        found[samples] = _digits(ranks[0])
    assert found[0] == found[5]
    assert [row["step"] for row in _validated(tmp_path / "5")] == [2, 4, 5]
    # NeMo's logger gets it too.
    events = next((tmp_path / "5" / "logs").glob("events.out.tfevents*")).read_bytes()
    assert b"validation/loss" in events
    assert b"validation/loss" not in next((tmp_path / "0" / "logs").glob("events.out.tfevents*")).read_bytes()


def _scripted(job: Job, losses: dict[int, float], kill_at: str = "") -> list[int]:
    """Runs a job whose validations find these losses, by step; returns the steps of its log."""
    from hybridprune_megatron.engine.validation import Validator

    def measure(self: Any, state: Any) -> dict[str, float]:
        return {"loss": losses[state.scheduler.num_steps], "samples": 5}

    # This process ends with the test.
    Validator.measure = measure  # type: ignore[method-assign]
    return [row["step"] for row in run_job(job, 0.0, kill_at)]


LOSSES = {2: 1.0, 4: 0.5, 6: math.nan, 8: 0.9, 10: 0.7, 12: 0.4}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_stays_beside_the_newest(tmp_path: Path, asynchronous: bool) -> None:
    job = _validating(tmp_path, keep_best="loss", keep_last=1, async_save=asynchronous)
    run_world(1, _scripted, job, LOSSES)
    assert _checkpoints(tmp_path) == [4, 8]
    run = json.loads((tmp_path / "checkpoints/step_00000008/run.json").read_text())
    assert run["best"] == {"figure": "loss", "step": 4, "value": 0.5}


def test_some_checkpoints_stay_for_ever(tmp_path: Path) -> None:
    job = _validating(tmp_path, save_every_n_steps=1, keep_every_n_steps=3, keep_last=3)
    run_world(1, _scripted, job, LOSSES)
    assert _checkpoints(tmp_path) == [3, 6, 7, 8]


def test_the_best_is_remembered_over_a_kill(tmp_path: Path) -> None:
    job = _validating(tmp_path, keep_best="loss", keep_last=1)
    with pytest.raises(AssertionError, match=_KILLED):
        run_world(1, _scripted, job, LOSSES, "step:8")
    assert _checkpoints(tmp_path) == [4, 6]
    run_world(1, _scripted, job, LOSSES)
    assert _checkpoints(tmp_path) == [4, 8]
    # Other samples give other figures: those of before say nothing any more.
    job.trainer.eval_samples, job.trainer.max_steps = 4, 12
    run_world(1, _scripted, job, {**LOSSES, 10: 2.0, 12: 3.0})
    assert _checkpoints(tmp_path) == [10, 12]


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path: Path) -> None:
    job = _validating(tmp_path, max_steps=12, early_stopping=2)
    assert run_world(1, _scripted, job, LOSSES)[0] == list(range(1, 9))
    assert _checkpoints(tmp_path) == [6, 8]
    assert run_world(1, _scripted, job, LOSSES)[0] == list(range(1, 9))
    job.trainer.early_stopping = 4
    assert run_world(1, _scripted, job, LOSSES)[0] == list(range(1, 13))
    assert [row["step"] for row in _validated(tmp_path)] == [2, 4, 6, 8, 10, 12]


def _without_answers(job: Job) -> None:
    from functools import partial

    from tests.engine import held_out

    held_out.counts = partial(held_out.counts, answered=False)
    with pytest.raises(ValueError, match=r"^trainer.keep_best=accuracy: no sample .*; set trainer.keep_best=loss"):
        run_job(job)
    job.trainer.keep_best = None
    run_job(job)


def test_samples_without_answers_give_losses_only(tmp_path: Path) -> None:
    run_world(1, _without_answers, _validating(tmp_path, keep_best="accuracy", max_steps=2))
    (row,) = _validated(tmp_path)
    assert sorted(row) == ["loss", "samples", "step"]
