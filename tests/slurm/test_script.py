"""What slurm/finetune.sh does with its ranks' exit status and with Slurm's warning; srun and scontrol are stand-ins."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hybridprune_megatron.engine.preemption import STOPPED
from tests.own_time import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]

#: Lists its arguments; then ends with $RANKS_STATUS, or with $WARNED_STATUS once it is signalled.
_SRUN = """#!/bin/bash
trap 'exit "$WARNED_STATUS"' USR1
printf '%s\\n' "cpus=$SRUN_CPUS_PER_TASK" "$@" > "$CALLS/srun.writing"
mv "$CALLS/srun.writing" "$CALLS/srun"
[[ -n "$RANKS_STATUS" ]] && exit "$RANKS_STATUS"
while true; do sleep 0.05; done
"""
_SCONTROL = """#!/bin/bash
echo "$*" >> "$CALLS/scontrol"
"""


class Script:
    """slurm/finetune.sh, started."""

    def __init__(self, folder: Path, *overrides: str, **environment: str) -> None:
        self.calls = folder
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3"}
        path = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(folder)}
        self.process = subprocess.Popen(
            [ROOT / "slurm" / "finetune.sh", *overrides],
            cwd=ROOT,
            env={**os.environ, **job, **path, "RANKS_STATUS": "", "WARNED_STATUS": "", **environment},
            start_new_session=True,
        )

    def send(self, number: signal.Signals) -> None:
        """As Slurm does it, once the ranks run."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (self.calls / "srun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.process.send_signal(number)

    def ended(self) -> tuple[int, list[str]]:
        """Exit status, and what scontrol was called with."""
        try:
            self.process.wait(HANG_SECONDS)
        finally:
            # Ranks that nobody ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        asked = self.calls / "scontrol"
        return self.process.returncode, asked.read_text().splitlines() if asked.exists() else []


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, []), (1, []), (137, []), (STOPPED, ["requeue 7"])],
)
def test_only_ranks_that_stopped_are_queued_again(tmp_path: Path, status: int, requeued: list[str]) -> None:
    assert Script(tmp_path, RANKS_STATUS=str(status)).ended() == (status, requeued)


@pytest.mark.parametrize(
    ("status", "requeued"),
    # Finished in time; stopped; died of the signal because they did not listen yet.
    [(0, []), (STOPPED, ["requeue 7"]), (138, ["requeue 7"])],
)
def test_a_warning_reaches_the_ranks(tmp_path: Path, status: int, requeued: list[str]) -> None:
    script = Script(tmp_path, WARNED_STATUS=str(status))
    script.send(signal.SIGUSR1)
    assert script.ended() == (status, requeued)


def test_ended_as_a_whole_it_does_not_come_back(tmp_path: Path) -> None:
    script = Script(tmp_path, WARNED_STATUS=str(STOPPED))
    script.send(signal.SIGTERM)
    assert script.ended() == (-signal.SIGTERM, [])


def test_overrides_python_and_options_of_srun(tmp_path: Path) -> None:
    script = Script(
        tmp_path,
        "experiment=demo",
        "data.train=a folder",
        RANKS_STATUS="0",
        PYTHON="container exec image python",
        SRUN_OPTIONS="--container-image=a --container-mounts=b",
    )
    assert script.ended() == (0, [])
    lines = (tmp_path / "srun").read_text().splitlines()
    assert lines[:3] == ["cpus=3", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    assert lines[3:5] == ["--container-image=a", "--container-mounts=b"]
    assert lines[5:] == [
        "container",
        "exec",
        "image",
        "python",
        "recipes/finetune.py",
        "experiment=demo",
        "data.train=a folder",
    ]


def _overrides(folder: Path, *overrides: str, **environment: str) -> list[str]:
    """What the ranks are started with."""
    folder.mkdir()
    assert Script(folder, *overrides, RANKS_STATUS="0", PYTHON="python", **environment).ended() == (0, [])
    lines = (folder / "srun").read_text().splitlines()
    return lines[lines.index("recipes/finetune.py") + 1 :]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["experiment=demo"], "runs/${name}/task_3"),
        (["name=sweep"], "runs/${name}/task_3"),
        (["output_dir=/data/a run"], "/data/a run/task_3"),
        (["++output_dir=/data/a", "experiment=demo"], "/data/a/task_3"),
        (["output_dir='/data/a (1)'"], "'/data/a (1)/task_3'"),
        # Already one folder per task.
        (["name=sweep_${oc.env:SLURM_ARRAY_TASK_ID}"], "runs/${name}"),
        (["output_dir=/data/${oc.env:SLURM_ARRAY_TASK_ID}"], "/data/${oc.env:SLURM_ARRAY_TASK_ID}"),
        # The number only chooses a seed.
        (["trainer.seed=${oc.env:SLURM_ARRAY_TASK_ID}"], "runs/${name}/task_3"),
    ],
)
def test_every_task_of_an_array_has_a_folder_of_its_own(tmp_path: Path, given: list[str], folder: str) -> None:
    kept = [override for override in given if "output_dir=" not in override]
    assert _overrides(tmp_path / "third", *given, SLURM_ARRAY_TASK_ID="3") == [*kept, f"output_dir={folder}"]
    assert _overrides(tmp_path / "alone", *given) == given


def test_all_groups_of_a_heterogeneous_job_are_started(tmp_path: Path) -> None:
    # As in such a job, where the numbers of all groups have other names.
    job = {"SLURM_HET_SIZE": "3", "SLURM_JOB_NUM_NODES": "", "SLURM_NTASKS": ""}
    for folder, options, expected in (
        ("all", "", "--het-group=0-2"),
        ("chosen", "--het-group=1", "--het-group=1"),
    ):
        _overrides(tmp_path / folder, SRUN_OPTIONS=options, **job)
        lines = (tmp_path / folder / "srun").read_text().splitlines()
        assert [line for line in lines if "het-group" in line] == [expected]
