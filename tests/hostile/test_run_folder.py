"""Two runs never write one folder at once, and nothing that has ended keeps the next run out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridprune_megatron.commands import finetune
from hybridprune_megatron.engine import run_lock
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.run_lock import Holder, hold_folder, release_folder

#: Holds a folder and says so; with "fork", with a child that lives on, which says it once it runs.
_HOLD = """
import os, sys, time
from pathlib import Path
from hybridprune_megatron.engine.run_lock import hold_folder
hold_folder(Path(sys.argv[1]))
if "fork" not in sys.argv or os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""
#: "At once", on a busy machine.
_AT_ONCE = 3.0

StartHolder = Callable[..., subprocess.Popen]


@pytest.fixture
def start_holder() -> Iterator[StartHolder]:
    """Starts another process that holds a folder."""
    started: list[subprocess.Popen] = []

    def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", _HOLD, str(folder), *words]
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        # The group of a process that was killed and left no child is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.1)
    yield
    run_lock._release_all()


def _refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=f"^output_dir={re.escape(str(folder))}: ") as refused:
        hold_folder(folder)
    line = str(refused.value)
    assert "\n" not in line
    return line


def _leave_note(folder: Path, holder: Holder) -> None:
    """As a run leaves it that was killed, or that runs elsewhere."""
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(asdict(holder)))


ELSEWHERE = Holder("node17", 4321, 99, "812", 0, "2026-11-28 10:00:00 +0000")


def test_a_second_run_ends_in_one_line_that_names_the_first(tmp_path: Path, start_holder: StartHolder) -> None:
    run = tmp_path / "runs" / "one"
    first = start_holder(run, SLURM_JOB_ID="77")
    line = _refusal(run)
    assert line.startswith(f"output_dir={run}: process {first.pid} on {socket.gethostname()}, Slurm job 77, since 20")
    assert line.endswith("wait for its end, or give name=<name> for a run of its own")
    # By another path too, but not in another folder, and an export's own folder inside is free.
    (tmp_path / "link").symlink_to(run)
    assert "process" in _refusal(tmp_path / "link")
    hold_folder(tmp_path / "runs" / "two")
    hold_folder(run / "hf")
    (run / "hf" / "config.json").write_text("{}")


@pytest.mark.parametrize("words", [(), ("fork",)], ids=["alone", "with a child that lives on"])
def test_a_killed_run_holds_nothing(tmp_path: Path, start_holder: StartHolder, words: tuple[str, ...]) -> None:
    first = start_holder(tmp_path, *words)
    first.kill()
    first.wait()
    start = time.monotonic()
    hold_folder(tmp_path)
    # The same process may ask again, and others are refused now.
    hold_folder(tmp_path)
    assert time.monotonic() - start < _AT_ONCE
    done = subprocess.run(
        [sys.executable, "-c", _HOLD, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert f"process {os.getpid()} on " in done.stderr


def test_a_released_folder_is_free_and_names_nobody(tmp_path: Path, start_holder: StartHolder) -> None:
    hold_folder(tmp_path)
    release_folder(tmp_path)
    assert (tmp_path / "run.lock").read_bytes() == b""
    start_holder(tmp_path)
    release_folder(tmp_path / "never")


def test_a_requeued_job_waits_for_what_its_former_start_still_seems_to_hold(
    tmp_path: Path, start_holder: StartHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = start_holder(tmp_path, SLURM_JOB_ID="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert "Slurm job 77" in _refusal(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    real, asked = run_lock._flock, []

    def flock(descriptor: int) -> bool | None:
        asked.append(descriptor)
        if len(asked) == 3:
            former.kill()
            former.wait()
        return real(descriptor)

    monkeypatch.setattr(run_lock, "_flock", flock)
    hold_folder(tmp_path)
    assert len(asked) == 3


def _no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def _local_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_is_local_lock", lambda path: True)


def _slurm_says(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "squeue").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("without", [_no_flock, _local_flock], ids=["no locks", "locks of one machine"])
@pytest.mark.parametrize(
    ("says", "free"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo PENDING", True),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_where_locks_do_not_reach_slurm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Callable, says: str, free: bool
) -> None:
    run = tmp_path / "run"
    _leave_note(run, ELSEWHERE)
    without(monkeypatch)
    _slurm_says(tmp_path / "bin", monkeypatch, says)
    if free:
        hold_folder(run)
        return
    line = _refusal(run)
    assert f"process 4321 on node17, Slurm job 812, since {ELSEWHERE.since}" in line
    assert f"if it has ended, delete {run / 'run.lock'}" in line


@pytest.mark.parametrize("without", [_no_flock, _local_flock], ids=["no locks", "locks of one machine"])
def test_where_locks_do_not_reach_the_note_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Callable
) -> None:
    without(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    # Elsewhere and without a job, nobody knows.
    _leave_note(tmp_path / "far", replace(ELSEWHERE, job=""))
    assert "process 4321 on node17, since" in _refusal(tmp_path / "far")
    # The job's own former start has ended, or Slurm would not have started it again.
    _leave_note(tmp_path / "requeued", ELSEWHERE)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    assert "node17" in _refusal(tmp_path / "requeued")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    hold_folder(tmp_path / "requeued")
    # Here, a process of the same number that began later is another one.
    _leave_note(tmp_path / "near", replace(Holder.here(), began=1, job=""))
    hold_folder(tmp_path / "near")


def test_without_locks_a_living_process_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_holder: StartHolder
) -> None:
    first = start_holder(tmp_path)
    _no_flock(monkeypatch)
    assert f"process {first.pid} on " in _refusal(tmp_path)
    first.kill()
    # Not waited for yet: a process that is dead but still listed.
    deadline = time.monotonic() + 30
    while run_lock._began(first.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    hold_folder(tmp_path)


def test_without_locks_the_later_of_two_at_the_same_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_flock(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: _leave_note(tmp_path, ELSEWHERE))
    assert "process 4321 on node17" in _refusal(tmp_path)


@pytest.mark.parametrize(
    "note",
    [b"", b"\xff\x00", b"[" * 900, b"[1]", b'{"host": 7}', b'{"host": "n", "process": true}', b"1" * 1000],
    ids=repr,
)
def test_a_note_that_cannot_be_read_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: bytes
) -> None:
    _no_flock(monkeypatch)
    (tmp_path / "run.lock").write_bytes(note)
    hold_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("host:/data {} nfs4 rw,vers=4.2,local_lock=none 0 0", False),
        ("host:/data {} nfs rw,vers=3,nolock,local_lock=all 0 0", True),
        ("mgs@tcp:/work {} lustre rw,flock,lazystatfs 0 0", False),
        ("mgs@tcp:/work {} lustre rw,localflock 0 0", True),
        ("s3 {} fuse.s3fs rw 0 0", True),
        ("beegfs {} beegfs rw 0 0", True),
        ("/dev/sda1 {} ext4 rw 0 0", False),
        ("/dev/sda1 {}/deeper fuse rw 0 0", False),
        ("broken", False),
    ],
)
def test_whether_locks_reach_other_machines_is_read_from_the_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, local: bool
) -> None:
    run = tmp_path / "a run"
    mounts = tmp_path / "mounts"
    mounts.write_text("overlay / overlay rw 0 0\n" + line.format(str(run).replace(" ", "\\040")) + "\n")
    monkeypatch.setattr(run_lock, "_MOUNTS", mounts)
    assert run_lock._is_local_lock(run / "run.lock") is local


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a user's own")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        line = _refusal(folder)
        assert f"output_dir={folder}: cannot be written (" in line
        assert line.endswith("give another output_dir")
    assert (tmp_path / "file").read_text() == "a user's own"


def test_the_recipe_refuses_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_holder: StartHolder, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start_holder(tmp_path)
    cfg = SimpleNamespace(
        output_dir=str(tmp_path), trainer=SimpleNamespace(num_nodes=1, devices=2, deterministic=False)
    )
    monkeypatch.setattr(finetune, "parse_command_line", lambda argv: cfg)
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    reached = RuntimeError("where the imports begin")

    def imports(say: bool) -> None:
        raise reached

    monkeypatch.setattr(finetune, "hold_stop_signals", imports)
    for rank in (0, 1):
        monkeypatch.setattr(finetune, "read_launch", lambda rank=rank: Launch(rank, 2, rank, 2, "n1", 1, "torchrun"))
        with pytest.raises(SystemExit):
            finetune.main()
        # Rank 0 speaks for all; its launcher ends the others.
        printed = capsys.readouterr().err
        assert (f"process {first.pid} on " in printed) is (rank == 0)
        assert ("where the imports begin" in printed) is (rank != 0)
