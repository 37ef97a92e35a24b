"""Reading what torchrun and srun leave in the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hybridprune_megatron.commands import finetune
from hybridprune_megatron.engine.launch import Launch, check_launch, first_host, launch_overrides, read_launch
from hybridprune_megatron.engine.slurm import tasks_per_node

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC_", "SLURM_", "ENVIRONMENT")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(_NAMES):
            monkeypatch.delenv(name)
    # No Slurm of this machine.
    monkeypatch.setenv("PATH", "/nowhere")


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


def _step(monkeypatch: pytest.MonkeyPatch, task: tuple[int, int, int], tasks: str, nodes: str, **more: object) -> None:
    """What Slurm 22.05 gave a task (rank, node, local rank) of a step; more: what else it said then."""
    rank, node, local = task
    sizes = tasks_per_node(tasks)
    _set(monkeypatch, SLURM_PROCID=rank, SLURM_NODEID=node, SLURM_LOCALID=local, SLURM_JOB_ID=7, SLURM_STEP_ID=0)
    _set(monkeypatch, SLURM_NTASKS=sum(sizes), SLURM_STEP_NUM_TASKS=sum(sizes), SLURM_STEP_NUM_NODES=len(sizes))
    _set(monkeypatch, SLURM_STEP_TASKS_PER_NODE=tasks, SLURM_STEP_NODELIST=nodes, ENVIRONMENT="BATCH", **more)


def _place(launch: Launch) -> tuple[int, ...]:
    return (
        launch.rank,
        launch.world_size,
        launch.node_rank,
        launch.num_nodes,
        launch.local_rank,
        launch.local_world_size,
    )


@pytest.mark.parametrize(
    ("task", "tasks", "place"),
    [
        ((2, 1, 0), "2(x2)", (2, 4, 1, 2, 0, 2)),
        # srun --distribution=cyclic
        ((1, 1, 0), "2(x2)", (1, 4, 1, 2, 0, 2)),
        ((2, 0, 1), "2(x2)", (2, 4, 0, 2, 1, 2)),
        ((2, 1, 0), "2,1", (2, 3, 1, 2, 0, 1)),
        ((1, 0, 1), "2,1", (1, 3, 0, 2, 1, 2)),
        ((6, 3, 0), "2(x3),1", (6, 7, 3, 4, 0, 1)),
        ((9, 1, 8), "1,9(x1)", (9, 10, 1, 2, 8, 9)),
    ],
)
def test_a_task_s_place_is_what_slurm_says(
    monkeypatch: pytest.MonkeyPatch, task: tuple[int, int, int], tasks: str, place: tuple[int, ...]
) -> None:
    _step(monkeypatch, task, tasks, "n[1-9]")
    assert _place(read_launch()) == place


def test_a_step_of_fewer_nodes_meets_on_its_own_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocation says stays as it was: four nodes and eight tasks."""
    _step(monkeypatch, (1, 0, 1), "2", "n4", SLURM_NNODES=4, SLURM_NODELIST="n[1-4]", SLURM_TASKS_PER_NODE="2(x4)")
    launch = read_launch()
    assert _place(launch) == (1, 2, 0, 1, 1, 2)
    assert launch.main_address == "n4"


def test_a_heterogeneous_job(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"SLURM_HET_SIZE": 2, "SLURM_NTASKS_HET_GROUP_0": 2, "SLURM_NTASKS_HET_GROUP_1": 4}
    groups |= {"SLURM_TASKS_PER_NODE_HET_GROUP_0": "2", "SLURM_TASKS_PER_NODE_HET_GROUP_1": "2(x2)"}
    groups |= {"SLURM_JOB_NODELIST_HET_GROUP_0": "big1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]"}
    with monkeypatch.context() as one_step:
        _step(one_step, (5, 2, 1), "2(x3)", "big1,n[1-2]", **groups)
        assert _place(read_launch()) == (5, 6, 2, 3, 1, 2)
        assert read_launch().main_address == "big1"
    # Where only the groups are told, and the task's own numbers of them.
    _set(monkeypatch, SLURM_PROCID=5, SLURM_NODEID=2, SLURM_LOCALID=1, SLURM_JOB_ID=7, **groups)
    _set(monkeypatch, SLURM_NTASKS=4, SLURM_TASKS_PER_NODE="2(x2)", SLURM_NODELIST="n[1-2]")
    assert _place(read_launch()) == (5, 6, 2, 3, 1, 2)
    assert read_launch().main_address == "big1"


@pytest.mark.parametrize(
    "variables",
    [
        # The script of sbatch, without a number of tasks and with one.
        {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NNODES": 1, "ENVIRONMENT": "BATCH"},
        {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 8, "ENVIRONMENT": "BATCH"},
        # The shell of salloc: on the submitting machine, and as a step of its own.
        {"SLURM_NTASKS": 8, "SLURM_NNODES": 2, "SLURM_NODELIST": "n[1-2]"},
        {
            "SLURM_PROCID": 0,
            "SLURM_LOCALID": 0,
            "SLURM_NTASKS": 8,
            "SLURM_STEP_NUM_TASKS": 1,
            "SLURM_STEP_ID": 4294967290,
        },
        {"RANK": 0},
        {"WORLD_SIZE": 1},
    ],
    ids=str,
)
def test_what_is_one_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]) -> None:
    _set(monkeypatch, **variables)
    assert read_launch() == Launch()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"SLURM_PROCID": 3}, "SLURM_PROCID=3 is set but SLURM_NTASKS is not; start the job with srun"),
        ({"SLURM_PROCID": 4, "SLURM_NTASKS": 4, "SLURM_LOCALID": 0}, "SLURM_PROCID=4 of 4 tasks"),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 4}, "SLURM_LOCALID is not"),
        ({"SLURM_PROCID": "one", "SLURM_NTASKS": 4}, "SLURM_PROCID='one' is not a number"),
        ({"SLURM_PROCID": -1, "SLURM_NTASKS": 4}, "SLURM_PROCID='-1' is not a number"),
        ({"SLURM_PROCID": "9" * 5000, "SLURM_NTASKS": 4}, "is not a number"),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 4, "SLURM_LOCALID": 2, "SLURM_NNODES": 2},
            "SLURM_NODEID=0 and SLURM_LOCALID=2 do not fit the 2, 2 tasks on the step's 2 nodes",
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 3, "SLURM_LOCALID": 1, "SLURM_NNODES": 2},
            "3 tasks on 2 nodes, and SLURM_TASKS_PER_NODE does not say how many on each",
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "SLURM_TASKS_PER_NODE": "2(y1)"},
            r"SLURM_TASKS_PER_NODE='2\(y1\)': expected numbers as in '2\(x3\),1'",
        ),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1}, "SLURM_NODELIST is not set.*export MASTER_ADDR"),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "SLURM_NODELIST": "n[1-"},
            r"'n\[1-' is not a list of hosts.*export MASTER_ADDR",
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "MASTER_ADDR": "n1"},
            "SLURM_JOB_ID is not set.*export MASTER_PORT",
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "MASTER_ADDR": "n1", "MASTER_PORT": 65536},
            "MASTER_PORT=65536: must be from 1 to 65535",
        ),
        ({"RANK": 1}, "RANK=1 is set but WORLD_SIZE is not; start the job with torchrun, or unset RANK"),
        ({"WORLD_SIZE": 8}, "WORLD_SIZE=8 is set but RANK is not"),
    ],
)
def test_what_cannot_be_right_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, object], line: str
) -> None:
    _set(monkeypatch, **variables)
    with pytest.raises(ValueError, match=line) as refused:
        read_launch()
    assert "\n" not in str(refused.value)
    # The recipe ends with it, too.
    _check_refusal(capsys, line)


def _check_refusal(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """The recipe ends with status 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        finetune.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(line, printed)
    assert printed.count("\n") == 1


def _torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local: int, local_size: int) -> None:
    _set(monkeypatch, RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local, LOCAL_WORLD_SIZE=local_size)
    _set(monkeypatch, MASTER_ADDR="n1", MASTER_PORT=29500)


@pytest.mark.parametrize(
    ("torchrun", "more"),
    [
        # One torchrun in each of two tasks, and one rank in each of two tasks.
        ((5, 8, 1, 4), {}),
        ((1, 2, 0, 1), {}),
        # torchrun numbers its machines by itself.
        ((1, 8, 1, 4), {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 2}),
    ],
    ids=str,
)
def test_torchrun_in_tasks_of_slurm(
    monkeypatch: pytest.MonkeyPatch, torchrun: tuple[int, int, int, int], more: dict[str, object]
) -> None:
    _step(monkeypatch, (1, 1, 0), "1(x2)", "n[1-2]")
    _torchrun(monkeypatch, *torchrun)
    _set(monkeypatch, **more)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.launcher) == (torchrun[0], torchrun[1], "torchrun")
    assert launch.node_rank == more.get("GROUP_RANK", 1)


@pytest.mark.parametrize("torchrun", [(0, 1, 0, 1), (0, 2, 0, 1), (0, 8, 0, 4), (1, 4, 1, 4)], ids=str)
def test_torchrun_s_variables_from_elsewhere_are_refused_in_a_task_of_slurm(
    monkeypatch: pytest.MonkeyPatch, torchrun: tuple[int, int, int, int]
) -> None:
    """Every task would take itself for the same rank."""
    _step(monkeypatch, (1, 1, 0), "1(x2)", "n[1-2]")
    _torchrun(monkeypatch, *torchrun)
    with pytest.raises(ValueError, match="contradict Slurm's task 1 of 2: unset RANK and WORLD_SIZE"):
        read_launch()


@pytest.mark.parametrize(
    ("rank", "world_size", "local", "local_size"), [(8, 8, 0, 4), (0, 8, 4, 4), (0, 2, 0, 4), (0, 2, 1, 2)]
)
def test_torchrun_s_variables_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local: int, local_size: int
) -> None:
    _torchrun(monkeypatch, rank, world_size, local, local_size)
    with pytest.raises(
        ValueError, match=f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local}.*cannot all be true"
    ):
        read_launch()


def test_machines_with_different_numbers_of_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as step:
        _step(step, (2, 1, 0), "2,1", "n[1-2]")
        with pytest.raises(ValueError, match=r"srun started 2, 1 processes on its 2 machines.*give --ntasks-per-node"):
            launch_overrides(read_launch(), [])
        _check_refusal(capsys, "srun started 2, 1 processes")
    _torchrun(monkeypatch, 2, 3, 0, 1)
    _set(monkeypatch, GROUP_WORLD_SIZE=2)
    with pytest.raises(ValueError, match="torchrun started 1 of 3 processes on this one of 2 machines"):
        read_launch()


def test_jobs_and_steps_on_one_machine_meet_at_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in range(1000, 1040):
        for step in range(4):
            _step(monkeypatch, (1, 0, 1), "2", "n1")
            _set(monkeypatch, SLURM_JOB_ID=job, SLURM_STEP_ID=step)
            ports.add(read_launch().main_port)
    assert len(ports) == 160
    assert min(ports) >= 20000
    assert max(ports) < 40000
    # Steps of salloc's shell and the like have numbers near 2^32.
    _set(monkeypatch, SLURM_STEP_ID=4294967290)
    assert 20000 <= read_launch().main_port < 40000


HOSTS = [
    ("n1", "n1"),
    ("n1,n2", "n1"),
    ("n[03-05,9],m1", "n03"),
    ("gpu-a[2,4]", "gpu-a2"),
    ("a-1-[7]", "a-1-7"),
    ("r[1-2]n[3-4]", "r1n3"),
    ("r[02,4-5]-n[3,9],x", "r02-n3"),
    ("gpu-[1-4]-ib", "gpu-1-ib"),
    ("rack[1-2]n[003-010].cluster.example", "rack1n003.cluster.example"),
    ("a[1,3]b[2,4]c[09-11],d[1-2]", "a1b2c09"),
    ("n[[1-2],[5-6]]x", "n1x"),
    ("[7-9]", "7"),
    (",n2", "n2"),
    (" n3 , n4", "n3"),
    ("login", "login"),
]


@pytest.mark.parametrize(("text", "host"), HOSTS)
def test_first_host(text: str, host: str) -> None:
    assert first_host(text) == host


@pytest.mark.parametrize("text", ["", ",", "n[1-", "n]1", "n[]", "n[,]", "n[-3]", "[[1]", "n 1", "$(id)[1-2]", "-h"])
def test_what_is_no_list_of_hosts(text: str) -> None:
    if text == "-h":
        # A name as good as any: not an option of scontrol's.
        assert first_host(text) == "-h"
        return
    with pytest.raises(ValueError, match="is not a list of hosts as Slurm writes it") as refused:
        first_host(text)
    assert "\n" not in str(refused.value)


def _scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "scontrol").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_where_there_is_a_slurm_it_says_who_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, monkeypatch, 'echo "$*" > "${0%/*}/asked"; printf "front\nother\n"')
    assert first_host("n[1-2]") == "front"
    assert (tmp_path / "asked").read_text() == "show hostnames n[1-2]\n"


@pytest.mark.parametrize("script", ["echo Invalid hostlist >&2; exit 1", "true", "sleep 30"])
def test_a_slurm_that_does_not_know_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """Slurm 22.05 refuses text after a bracket, and retries for a minute where its configuration is missing."""
    _scontrol(tmp_path, monkeypatch, script)
    monkeypatch.setattr("hybridprune_megatron.engine.slurm._SCONTROL_SECONDS", 0.2)
    assert first_host("gpu-[1-4]-ib") == "gpu-1-ib"


@pytest.mark.parametrize(
    ("text", "sizes"), [("2", (2,)), ("2(x3),1", (2, 2, 2, 1)), ("8(x2),4(x1),1", (8, 8, 4, 1)), (" 1 , 2", (1, 2))]
)
def test_tasks_per_node(text: str, sizes: tuple[int, ...]) -> None:
    assert tasks_per_node(text) == sizes


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
