"""The demo's command line; the whole demo with a few steps is a slow test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own_time import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def _demo(folder: Path, *arguments: str, timeout: float = HANG_SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs the demo in the checkout, everything it writes below ``folder``."""
    data = [f"data.{split}={folder}/out/data/{split}" for split in ("train", "validation")]
    return subprocess.run(
        [sys.executable, "recipes/demo.py", f"output_dir={folder}/out", *data, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"stands for weights")
    return f"model.init_checkpoint={path}"


def test_a_wrong_setting_is_one_line(tmp_path, weights):
    done = _demo(tmp_path, weights, "reduction.budget=1.5")
    assert done.returncode == 2
    assert "reduction.budget=1.5: must be above 0 and at most 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = _demo(tmp_path, weights, "trainer.eval_samples=0")
    assert done.returncode == 2
    assert "trainer.eval_samples=0" in done.stderr
    done = _demo(tmp_path, "model.init_checkpoint=nowhere.safetensors")
    assert done.returncode == 2
    assert "model.init_checkpoint=nowhere.safetensors: is not there" in done.stderr


def test_a_folder_with_another_run_is_left_alone(tmp_path, weights):
    record = tmp_path / "out" / "checkpoints" / "step_00000050" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"config": {"name": "other"}}))
    done = _demo(tmp_path, weights)
    assert done.returncode == 2
    assert "holds a run with other settings" in done.stderr
    assert "add --fresh, or output_dir=runs/<name>" in done.stderr
    assert record.is_file()


@pytest.mark.slow
def test_the_whole_demo_with_a_few_steps(tmp_path):
    # Something of the user's that --fresh must not delete.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    few = ["trainer.max_steps=3", "optim.warmup_steps=1", "trainer.save_every_n_steps=2", "trainer.eval_samples=10"]
    done = _demo(tmp_path, "--fresh", *few, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 3
    assert report["visual_tokens_per_sample"] == 256
    assert abs(report["mean_retention"] - report["budget"]) < 0.005
    assert len(report["retention_by_layer"]) == len(report["hybrid_pattern"])
    assert set(report["accuracy"]) == {"chance", "full_before", "reduced_before", "reduced_after", "full_after"}
    assert report["export_max_abs_logit_diff"] < 1e-4
    assert {"full", "reduced"} <= set(report["prefill_seconds"])
    assert report["question"]["truth"]
    assert (out / "plot.png").is_file()
    assert (out / "hf" / "model.safetensors").is_file()
    assert (out / "notes.txt").is_file()
    assert "accuracy, budget 0.25" in done.stdout
    again = _demo(tmp_path, *few, timeout=60)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 8
