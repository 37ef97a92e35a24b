"""What is looked at on every node before a job's ranks start: processes of one machine in the place of nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hybridprune_megatron.engine.bad_node import blame, is_hardware
from hybridprune_megatron.engine.preflight import NODE_AT_FAULT, Found, judge
from tests.own_time import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _start(rank: int, nodes: int, port: int, bad: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The look of one node; ``n<rank>`` is its name."""
    there = {"RANK": rank, "WORLD_SIZE": nodes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    launched = {name: str(value) for name, value in there.items()} | {"MASTER_ADDR": "127.0.0.1"}
    own = {"SLURMD_NODENAME": f"n{rank}", "BAD_NODE_FILE": str(bad), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hybridprune_megatron.engine.preflight", *arguments],
        cwd=ROOT,
        env={**os.environ, **launched, **own, "PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ended(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, list[str]]]:
    """Status and lines of every node."""
    try:
        said = [node.communicate(timeout=HANG_SECONDS)[0].splitlines() for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, lines) for node, lines in zip(nodes, said)]


def test_two_nodes_that_are_well(tmp_path: Path) -> None:
    port, folder = _free_port(), tmp_path / "run"
    job = ["experiment=demo", f"output_dir={folder}"]
    first, second = _ended([_start(rank, 2, port, tmp_path / "bad", *job) for rank in range(2)])
    status, lines = first
    assert status == 0, lines
    assert lines[:2] == ["preflight: GPUs: 0 on each of 2 nodes", "preflight: clocks: within 0.1 s"]
    assert lines[2].startswith("preflight: free space: ")
    assert f"GiB in output_dir {folder}" in lines[2]
    assert "GiB in TMPDIR " in lines[2]
    assert lines[3:] == ["preflight: output_dir: one folder on all nodes, writable"]
    assert second == (0, [])
    # Nothing is left in the run's folder, and nobody is blamed.
    assert not list(folder.iterdir())
    assert not (tmp_path / "bad").exists()


def test_a_folder_that_is_another_one_elsewhere(tmp_path: Path) -> None:
    port = _free_port()
    (tmp_path / "1").mkdir()
    nodes = [_start(rank, 2, port, tmp_path / "bad", f"output_dir={tmp_path / str(rank)}") for rank in range(2)]
    (status, lines), _ = _ended(nodes)
    assert status == 2
    line = (
        f"preflight: n1: output_dir={tmp_path / '1'} is another folder here than on the first node; give one that all"
    )
    assert lines[-1].startswith(line)
    assert not (tmp_path / "bad").exists()


def test_a_node_without_its_gpus_is_named(tmp_path: Path) -> None:
    port, job, bad = _free_port(), f"output_dir={tmp_path / 'run'}", tmp_path / "bad"
    # More than any machine has. Hidden on purpose, they are not missed.
    given = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "99"}
    nodes = [_start(0, 2, port, bad, job, **given), _start(1, 2, port, bad, job, **given, CUDA_VISIBLE_DEVICES="0")]
    (status, lines), _ = _ended(nodes)
    assert status == NODE_AT_FAULT, lines
    line = lines[-1].removeprefix("preflight: n1: ")
    assert line.startswith(("CUDA_VISIBLE_DEVICES=0 names GPUs, but ", "Slurm gave GPUs (SLURM_GPUS_ON_NODE=99), but "))
    assert bad.read_text() == f"n1 hardware {line}\n"


def test_a_node_that_does_not_report(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    node = _start(0, 2, _free_port(), bad, f"output_dir={tmp_path / 'run'}", PREFLIGHT_SECONDS="2")
    ((status, lines),) = _ended([node])
    # Without Slurm nobody knows its name, so none can be left out.
    assert (status, lines[-1]) == (NODE_AT_FAULT, "preflight: node 1 of 2: did not report within 2 s")
    assert not bad.exists()
    node = _start(1, 2, _free_port(), bad, f"output_dir={tmp_path / 'run'}", PREFLIGHT_SECONDS="2")
    ((status, lines),) = _ended([node])
    assert status == NODE_AT_FAULT
    assert lines[-1].startswith("preflight: 127.0.0.1: did not answer at 127.0.0.1:")


def test_a_wrong_command_line_is_one_line_for_all_nodes(tmp_path: Path) -> None:
    port = _free_port()
    first, second = _ended([_start(rank, 2, port, tmp_path / "bad", "no_such_key=1") for rank in range(2)])
    assert first[0] == second[0] == 2
    assert [len(first[1]), len(second[1])] == [1, 0]
    assert first[1][0].startswith("hybridprune preflight: no_such_key=1: ")


def test_an_all_reduce_over_all_ranks(tmp_path: Path) -> None:
    port = _free_port()
    (status, lines), (other, _) = _ended([_start(rank, 2, port, tmp_path / "bad", "--all-reduce") for rank in range(2)])
    assert (status, other) == (0, 0), lines
    assert any(line.startswith("preflight: all-reduce: 0.00390625 MiB over 2 ranks in ") for line in lines)


def test_what_all_nodes_lack_is_no_fault_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    both = {rank: Found(f"n{rank}", free={"TMPDIR /tmp": 0.1}, fault="0.10 GiB free") for rank in range(2)}
    assert judge(2, both, {0: 0.0, 1: 0.0}) == 2
    assert judge(2, {0: both[0], 1: Found("n1")}, {0: 0.0, 1: 0.0}) == NODE_AT_FAULT
    capsys.readouterr()
    # Clocks are told, and stop nobody.
    assert judge(2, {0: Found("n0"), 1: Found("n1")}, {0: 0.0, 1: 75.0}) == 0
    assert "preflight: n1: its clock is 75 s ahead" in capsys.readouterr().out


def test_texts_of_failing_hardware() -> None:
    for text in (
        "CUDA error: uncorrectable ECC error encountered",
        "NCCL error: unhandled system error, NCCL version 2.27",
        "NVRM: Xid (PCI:0000:07:00): 79, GPU has fallen off the bus",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
    ):
        assert is_hardware(text), text
    for text in (
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "ValueError: taxidermy",
        "loss=nan at step 3",
    ):
        assert not is_hardware(text), text


def test_the_first_who_is_blamed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blame("n1", "hardware", "nobody asks")
    monkeypatch.setenv("BAD_NODE_FILE", str(tmp_path / "bad"))
    blame("n1", "silent", "gone\nfor good")
    blame("n2", "hardware", "late")
    assert (tmp_path / "bad").read_text() == "n1 silent gone for good\n"
    monkeypatch.setenv("BAD_NODE_FILE", str(tmp_path / "no" / "bad"))
    blame("n1", "silent", "nowhere to write")
