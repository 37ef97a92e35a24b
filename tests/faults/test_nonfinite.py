"""A loss that is not a number stops the run or leaves one update out, and names the samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world


def _run_with_bad(job: Any, bad: tuple[str, ...], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Runs the job with samples whose loss or gradient is not a number; also the weights' sums before each step."""
    from hybridprune_megatron.engine.module import HybridPruneModule
    from tests.engine.tiny import TinyModel

    forward, training_step = TinyModel.forward, HybridPruneModule.training_step
    sums: list[float] = []

    def bad_forward(self: Any, batch: Any) -> Any:
        out = forward(self, batch)
        if set(batch.keys).isdisjoint(bad):
            return out
        if where == "loss":
            return out * float("nan")
        # Finite, with an infinite gradient.
        return out + (out - out.detach()).abs().sqrt()

    def summing_step(self: Any, batches: Any) -> Any:
        sums.append(sum(float(p.detach().double().sum()) for p in self.state.module.parameters()))
        return training_step(self, batches)

    TinyModel.forward = bad_forward  # type: ignore[method-assign]
    HybridPruneModule.training_step = summing_step  # type: ignore[method-assign]
    return run_job(job), sums


def test_nan_loss_stops_the_run_with_the_samples_key(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"FloatingPointError: loss=nan at step 5; samples 1/5; lower optim.lr"):
        run_world(1, _run_with_bad, tiny_job(tmp_path), ("1/5",), "loss")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(("processes", "where"), [(1, "loss"), (2, "loss"), (1, "gradient")])
def test_skipping_leaves_one_update_out(tmp_path: Path, processes: int, where: str) -> None:
    job = tiny_job(tmp_path, nonfinite="skip")
    rows, sums = run_world(processes, _run_with_bad, job, ("1/5",), where)[0]
    said = {"loss": "loss=nan at step 5; samples 1/5", "gradient": "gradient norm=nan .* step 5; samples 0/5, 1/5"}
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    assert re.match(said[where], rows[4]["skipped"])
    assert sums[5] == sums[4]
    assert sums[6] != sums[5]
    assert all(row["loss"] == row["loss"] for row in rows[5:])


def test_skipping_does_not_go_on_forever(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, nonfinite="skip", max_steps=20)
    bad = tuple(f"0/{count}" for count in range(4, 30))
    with pytest.raises(AssertionError, match=r"FloatingPointError: 10 updates in a row left out .*nan at step 13;"):
        run_world(1, _run_with_bad, job, bad, "loss")
