"""The real script on a real Slurm: two nodes, a preemption, the digits of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.engine.preemption import STOPPED
from hybridprune_megatron.engine.train_log import read_train_log
from scripts.make_demo_data import main as make_demo_data

ROOT = Path(__file__).resolve().parents[2]
#: Far above what any of the waits takes on a busy machine.
PATIENCE_S = 1500
STEPS = 40
#: The states a job stays in. It goes through many others, some for an instant (SIGNALING while Slurm warns it).
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
#: The job is preempted once it has done these.
ENOUGH = 3

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(4 * PATIENCE_S)]


class Cluster:
    """Slurm's commands on the dev cluster in a folder."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **os.environ,
            "DEV_CLUSTER_DIR": str(folder),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        done = self._try(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _try(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )

    def submit(self, *arguments: str) -> str:
        """Number of the submitted job."""
        return self.run("sbatch", "--parsable", *arguments)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says about a job, by key."""
        command = ("scontrol", "show", "job", "--oneliner", number)
        deadline = time.monotonic() + PATIENCE_S / 5
        while (done := self._try(*command)).returncode:
            # Slurm's commands give up on a controller that has no processor for some seconds.
            assert time.monotonic() < deadline, f"{' '.join(command)}: {done.stderr}"
            time.sleep(2)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A short path: munge's socket lies in it.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        cluster.run("scripts/dev_cluster.sh", "up")
        try:
            yield cluster
        finally:
            cluster.run("scripts/dev_cluster.sh", "down")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_demo_data(f"--out {folder} --train 13 --validation 0 --frames 8 --fps 1 --workers 1 --seed 3".split())
    return folder


def _submit(cluster: Cluster, data: Path, folder: Path, nodes: int = 2, steps: int = STEPS) -> str:
    """A job of one rank per node, without GPUs."""
    return cluster.submit(
        *(f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"),
        f"--output={folder}.log",
        "slurm/finetune.sh",
        *("experiment=demo", f"trainer.num_nodes={nodes}", f"output_dir={folder}", f"data.train={data / 'train'}"),
        *("data.num_frames=4", "data.sequence_length=320", "data.packing_buffer=4", "data.shuffle_buffer=6"),
        *("data.validation=null", "model.init_checkpoint=null", "data.num_workers=1"),
        # No checkpoint but the last, and the one that a signal asks for.
        *(f"trainer.max_steps={steps}", "trainer.save_every_n_steps=1000", "trainer.eval_samples=0"),
    )


def _wait(until: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, f"{PATIENCE_S} s and still waiting: {what()}"
        time.sleep(1)


def _finish(cluster: Cluster, number: str, log: Path) -> dict[str, str]:
    """Waits for the end of a job, which must be a good one."""
    job: dict[str, str] = {}

    def over() -> bool:
        job.update(cluster.job(number))
        return job["JobState"] in OVER

    _wait(over, lambda: _text(log))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), _text(log)
    return job


def _text(log: Path) -> str:
    """What a job has written so far. Ranks write at once, so one's progress bar may cut a character of another's."""
    return log.read_text(errors="replace") if log.exists() else "no log yet"


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train_log.jsonl"
    return read_train_log(path) if path.exists() else []


def _digits(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(row["step"], repr(row["loss"]), repr(row["grad_norm"]), repr(row["lr"]), row["samples"]) for row in rows]


def test_preempted_job_requeues_itself_and_ends_with_the_same_losses(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    whole, preempted = tmp_path / "whole", tmp_path / "preempted"
    assert _finish(cluster, _submit(cluster, data, whole), Path(f"{whole}.log"))["Restarts"] == "0"
    expected = _digits(_rows(whole))
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))

    log = Path(f"{preempted}.log")
    number = _submit(cluster, data, preempted)
    _wait(lambda: len(_rows(preempted)) >= ENOUGH, lambda: _text(log))
    # Wants both nodes: Slurm warns our job, and would kill it after the partition's GraceTime.
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job = _finish(cluster, number, log)

    assert job["Restarts"] == "1"
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    text = _text(log)
    saved = preempted / "checkpoints"
    stopped_at = text.split("asked to stop: saved after step ")[1].split(",")[0]
    assert ENOUGH <= int(stopped_at) < STEPS
    # Every rank ended by itself: srun's status would be another one if any had been killed.
    assert f"stopped with status {STOPPED}; queued again" in text
    # Straight on from the step at which it stopped.
    assert f"resuming from {saved / f'step_{int(stopped_at):08d}'}" in text
    assert _digits(_rows(preempted)) == expected
    # What is looked at before the ranks start, at both starts.
    assert text.count("preflight: GPUs: 0 on each of 2 nodes") == 2
    assert text.count("preflight: output_dir: one folder on all nodes, writable") == 2
    assert "all-reduce" not in text


def test_a_job_comes_back_without_the_node_that_failed(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    site, log = tmp_path / "site.sh", Path(f"{tmp_path / 'run'}.log")
    # A GPU that is not there, on the node that the job begins on.
    site.write_text('[[ -s "$BEGAN" ]] || echo "$SLURMD_NODENAME" > "$BEGAN"\n')
    with site.open("a") as stream:
        stream.write('[[ "$(< "$BEGAN")" != "$SLURMD_NODENAME" ]] || export CUDA_VISIBLE_DEVICES=99\n')
    cluster.environment |= {"SITE": str(site), "BEGAN": str(tmp_path / "began"), "PREFLIGHT": "nccl"}
    try:
        number = _submit(cluster, data, tmp_path / "run", nodes=1, steps=2)
        job = _finish(cluster, number, log)
    finally:
        for name in ("SITE", "BEGAN", "PREFLIGHT"):
            del cluster.environment[name]
    first = (tmp_path / "began").read_text().strip()
    other = {"n1": "n2", "n2": "n1"}[first]
    text = _text(log)
    assert (job["Restarts"], job["ExcNodeList"], job["NodeList"]) == ("1", first, other)
    assert f"{first}: CUDA_VISIBLE_DEVICES=99 names GPUs, but " in text
    assert "; queued again without it (restart 1 of 3)" in text
    assert "preflight: all-reduce: " in text
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2]
    assert not (ROOT / f"slurm-left-out-{number}").exists()
