"""What slurm/finetune.sh does with its ranks' exit status and with Slurm's warning; srun and scontrol are stand-ins."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridprune_megatron.engine.preemption import STOPPED
from tests.own_time import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]

#: Lists its arguments; then ends with $RANKS_STATUS, or with $WARNED_STATUS once it is signalled. What looks at the
#: nodes before them ends with $PREFLIGHT_STATUS. Both write down the node that $BLAMED_BEFORE or $BLAMED names.
_SRUN = """#!/bin/bash
if [[ "$*" == *engine.preflight* ]]; then
  echo "$*" >> "$CALLS/preflight"
  [[ -z "${BLAMED_BEFORE:-}" ]] || echo "$BLAMED_BEFORE" > "$BAD_NODE_FILE"
  exit "${PREFLIGHT_STATUS:-0}"
fi
[[ -z "${BLAMED:-}" ]] || echo "$BLAMED" > "$BAD_NODE_FILE"
trap 'exit "$WARNED_STATUS"' USR1
printf '%s\\n' "cpus=$SRUN_CPUS_PER_TASK" "$@" > "$CALLS/srun.writing"
mv "$CALLS/srun.writing" "$CALLS/srun"
[[ -n "$RANKS_STATUS" ]] && exit "$RANKS_STATUS"
while true; do sleep 0.05; done
"""
_SCONTROL = """#!/bin/bash
[[ "$1" == show ]] && { echo "JobId=7 ExcNodeList=${EXCLUDED:-(null)} MinMemoryNode=0"; exit; }
echo "$*" >> "$CALLS/scontrol"
"""
_SINFO = """#!/bin/bash
echo "${NODE_STATE:-idle}"
"""


class Script:
    """slurm/finetune.sh, started."""

    def __init__(self, folder: Path, *overrides: str, **environment: str) -> None:
        self.calls = folder
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("sinfo", _SINFO)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3"}
        path = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(folder)}
        self.process = subprocess.Popen(
            [ROOT / "slurm" / "finetune.sh", *overrides],
            cwd=ROOT,
            env={**os.environ, **job, **path, "RANKS_STATUS": "", "WARNED_STATUS": "", **environment},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        """What it has printed, once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

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


@pytest.fixture
def no_record() -> Iterator[Path]:
    """The record of nodes that job 7 was taken from; none before and after a test."""
    record = ROOT / "slurm-left-out-7"
    record.unlink(missing_ok=True)
    yield record
    record.unlink(missing_ok=True)
    assert not (ROOT / "slurm-bad-node-7").exists()


def test_every_node_is_looked_at_before_the_ranks(tmp_path: Path) -> None:
    assert Script(tmp_path, "experiment=demo", RANKS_STATUS="0", PYTHON="python").ended() == (0, [])
    module = "python -m hybridprune_megatron.engine.preflight"
    look = f"--cpu-bind=none --ntasks=2 --ntasks-per-node=1 {module}"
    assert (tmp_path / "preflight").read_text().splitlines() == [f"{look} experiment=demo"]
    (tmp_path / "nccl").mkdir()
    Script(tmp_path / "nccl", RANKS_STATUS="0", PYTHON="python", PREFLIGHT="nccl").ended()
    whole = f"--kill-on-bad-exit=1 --cpu-bind=none {module} --all-reduce"
    assert (tmp_path / "nccl" / "preflight").read_text().splitlines() == [look, whole]
    (tmp_path / "off").mkdir()
    Script(tmp_path / "off", RANKS_STATUS="0", PREFLIGHT="off").ended()
    assert not (tmp_path / "off" / "preflight").exists()


@pytest.mark.parametrize(("status", "ended"), [(1, 1), (2, 2), (3, 3), (STOPPED, 1)])
def test_a_failed_look_ends_the_job_before_training(tmp_path: Path, status: int, ended: int) -> None:
    script = Script(tmp_path, RANKS_STATUS="0", PREFLIGHT_STATUS=str(status))
    assert script.ended() == (ended, [])
    assert not (tmp_path / "srun").exists()
    assert "ended before its ranks started" in script.output()


def test_a_bad_node_is_left_out_a_few_times(tmp_path: Path, no_record: Path) -> None:
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        excluded = "n9" if count == 1 else "n9,n1"
        script = Script(
            folder,
            **{"PREFLIGHT_STATUS": "3", "BLAMED_BEFORE": f"n{count} hardware 7 of 8 GPUs", "EXCLUDED": excluded},
            MAX_RESTARTS="2",
        )
        assert script.ended() == (3, ["requeue 7", f"update JobId=7 ExcNodeList={excluded},n{count}"])
        line = f"job 7: n{count}: 7 of 8 GPUs; queued again without it (restart {count} of 2)"
        assert line in script.output().splitlines()
    (tmp_path / "last").mkdir()
    script = Script(
        tmp_path / "last", PREFLIGHT_STATUS="3", BLAMED_BEFORE="n3 hardware clock is gone", MAX_RESTARTS="2"
    )
    assert script.ended() == (3, [])
    assert "n3: clock is gone; not queued again, MAX_RESTARTS=2 are used up" in script.output()
    # A job that ends well starts counting anew.
    assert len(no_record.read_text().splitlines()) == 2
    (tmp_path / "well").mkdir()
    assert Script(tmp_path / "well", RANKS_STATUS="0").ended() == (0, [])
    assert not no_record.exists()


@pytest.mark.parametrize(
    ("status", "blamed", "state", "again"),
    [
        ("1", "n2 hardware CUDA error: uncorrectable ECC error encountered", "idle", True),
        # A rank that went without a word was killed, unless Slurm has lost the node too.
        ("137", "n2 silent rank 1 died", "mixed", False),
        ("137", "n2 silent rank 1 died", "down*", True),
        ("1", "n2 silent rank 1 died", "drained", True),
        ("1", "n2 silent rank 1 died", "allocated*", True),
        # A failure of the user's own.
        ("2", "n2 hardware CUDA error: uncorrectable ECC error encountered", "down", False),
        ("1", "", "down", False),
    ],
)
def test_only_hardware_brings_a_job_back(
    tmp_path: Path, no_record: Path, status: str, blamed: str, state: str, again: bool
) -> None:
    script = Script(tmp_path, RANKS_STATUS=status, BLAMED=blamed, NODE_STATE=state)
    calls = ["requeue 7", "update JobId=7 ExcNodeList=n2"] if again else []
    assert script.ended() == (int(status), calls)
    assert no_record.exists() == again


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("PREFLIGHT", "quickly", "PREFLIGHT=quickly: allowed are off, quick, nccl"),
        ("MAX_RESTARTS", "-1", "MAX_RESTARTS=-1: must be a whole number from 0 on"),
        ("SITE", "nowhere.sh", "SITE=nowhere.sh cannot be read; give a file of shell commands"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, name: str, value: str, line: str) -> None:
    script = Script(tmp_path, RANKS_STATUS="0", **{name: value})
    assert script.ended() == (2, [])
    assert script.output() == f"job 7: {line}\n"


def test_a_site_s_commands_come_first(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    # Modules use variables that may not be set.
    site.write_text('echo "loading $NOT_SET"\nexport PYTHON="from the site"\n')
    script = Script(tmp_path, RANKS_STATUS="0", SITE=str(site))
    assert script.ended() == (0, [])
    assert script.output().startswith("loading \n")
    assert (tmp_path / "srun").read_text().splitlines()[3:6] == ["from", "the", "site"]
