"""A unit measured for real: the committed base model on two held-out clips whose features are in shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = ROOT / "assets" / "bench" / "base.safetensors"
#: In a process of its own: a runner starts a process group and keeps its model.
MEASURE = """
import sys
from studies.needles.cells import Unit
from studies.needles.prefill import time_methods
from studies.needles.run import Runner
from pathlib import Path

runner = Runner((f"data.validation={sys.argv[1]}",), 2, 6000, 2)
rows = []
time_methods(runner, Path(sys.argv[2]), {}, lambda left: left[:1])
runner.measure(Unit("before", "attention_frames", 0, (0.25,)), (0.25,), rows.append)
print(rows[0]["mean_retention"], rows[0]["correct"])
"""


def python(*arguments: object) -> str:
    run = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_accuracy_and_prefill_time_of_a_unit(tmp_path: Path) -> None:
    clips, features, times = tmp_path / "clips", tmp_path / "features", tmp_path / "prefill.jsonl"
    python("studies/base/make_bench_data.py", "--out", clips, "--seed", 12, "--train", 0, "--validation", 2)
    python("scripts/precompute_features.py", "experiment=bench", f"model.init_checkpoint={WEIGHTS}",
           "--data", clips / "validation", "--out", features)  # fmt: skip
    retention, correct = python("-c", MEASURE, features, times).split()[-2:]
    assert abs(float(retention) - 0.25) < 0.01
    assert len(correct) == 2
    assert set(correct) <= {"0", "1"}
    (row,) = map(json.loads, times.read_text().splitlines())
    assert row["key"] == "contrast/0.25"
    # Half of the work or less; how much less a test under load cannot say.
    assert 0 < row["reduced_seconds"] < row["full_seconds"]
