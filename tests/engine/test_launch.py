"""Reading what torchrun and srun leave in the environment."""

from __future__ import annotations

import pytest

from hybridprune_megatron.engine.launch import Launch, check_launch, first_host, launch_overrides, read_launch

_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_NTASKS",
)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_nobody_launched() -> None:
    assert read_launch() == Launch()


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, MASTER_ADDR="n1", MASTER_PORT=29500)
    launch = read_launch()
    assert launch == Launch(5, 8, 1, 4, "n1", 29500, "torchrun")
    assert (launch.num_nodes, launch.node_rank) == (2, 1)


def test_torchrun_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT is not; start the job with torchrun"):
        read_launch()


def test_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, RANK="first", WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="n1", MASTER_PORT=1)
    with pytest.raises(ValueError, match="RANK='first' is not a number"):
        read_launch()


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SLURM_PROCID=3, SLURM_NTASKS=4, SLURM_LOCALID=1, SLURM_NNODES=2)
    _set(monkeypatch, SLURM_NODELIST="n[07-08]", SLURM_JOB_ID=40001)
    launch = read_launch()
    assert launch == Launch(3, 4, 1, 2, "n07", 20001, "srun")
    assert launch.node_rank == 1


def test_one_task_under_slurm_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=1, SLURM_LOCALID=0)
    assert read_launch() == Launch()


@pytest.mark.parametrize(
    ("text", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[03-05,9],m1", "n03"), ("gpu-a[2,4]", "gpu-a2"), ("a-1-[7]", "a-1-7")],
)
def test_first_host(text: str, host: str) -> None:
    assert first_host(text) == host


def test_launcher_fills_in_the_counts() -> None:
    launch = Launch(0, 8, 0, 4, "n1", 1, "torchrun")
    assert launch_overrides(launch, ["parallel.tensor=2"]) == ["trainer.num_nodes=2", "trainer.devices=4"]
    assert launch_overrides(launch, ["trainer.devices=4", "+trainer.num_nodes=2"]) == []
    assert launch_overrides(Launch(), []) == []


def test_missing_processes_are_named() -> None:
    check_launch(Launch(), 1, 1)
    with pytest.raises(
        ValueError, match="= 1 x 2 processes, 1 were started; run `torchrun --nnodes 1 --nproc_per_node 2"
    ):
        check_launch(Launch(), 1, 2)
