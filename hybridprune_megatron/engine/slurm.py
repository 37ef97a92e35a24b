"""What Slurm tells a task of srun about the job; read before torch is imported.

In order of trust: what srun says about the running step (``SLURM_STEP_*``), then the groups of a heterogeneous job,
then what the allocation says, which a step of fewer nodes or tasks inherits unchanged.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

_SCONTROL_SECONDS = 5.0
#: Above ports that services use. Jobs and steps that share a machine get different ones, as far as numbers go.
_FIRST_PORT, _NUM_PORTS, _STEP_STRIDE = 20000, 20000, 7919
#: "2(x3)": two tasks on each of three nodes.
_RUN_OF_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step of several; numbers count from 0.

    Attributes:
        rank: of all tasks.
        world_size: tasks of the step.
        local_rank: of the tasks on this node.
        node: this node's number in the step.
        node_sizes: tasks on every node of the step.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    node_sizes: tuple[int, ...]


def env_int(*names: str) -> int | None:
    """The first of these environment variables that is set, as a number; None: none is.

    Raises:
        ValueError: it is not a whole number from 0 on.
    """
    for name in names:
        text = os.environ.get(name, "")
        if text:
            if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) is None:
                raise ValueError(
                    f"environment variable {name}={text[:40]!r} is not a number from 0 on; it is set by the launcher"
                )
            return int(text)
    return None


def slurm_task() -> SlurmTask | None:
    """This process's place in its step; None: it is not a task of srun, or the only one.

    Raises:
        ValueError: variables that are missing or cannot all be true.
    """
    rank = env_int("SLURM_PROCID")
    if rank is None or _is_batch_script():
        return None
    world_size = env_int("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    groups = _het_groups()
    if "SLURM_STEP_NUM_TASKS" not in os.environ and groups and rank >= (world_size or 1):
        # The count is that of the task's own group only.
        world_size = sum(groups)
    if world_size is None and rank > 0:
        raise ValueError(
            f"SLURM_PROCID={rank} is set but SLURM_NTASKS is not; start the job with srun, or unset SLURM_PROCID for a "
            "single process"
        )
    if world_size is None or world_size <= 1:
        return None
    if rank >= world_size:
        raise ValueError(f"SLURM_PROCID={rank} of {world_size} tasks (SLURM_NTASKS): start the job with srun")
    local_rank = env_int("SLURM_LOCALID")
    if local_rank is None:
        raise ValueError(
            f"SLURM_PROCID={rank} of {world_size} tasks is set but SLURM_LOCALID is not; start the job with srun"
        )
    sizes = _node_sizes(world_size, groups)
    node = env_int("SLURM_NODEID")
    node = _node_of(rank, sizes) if node is None else node
    if node >= len(sizes) or local_rank >= sizes[node]:
        raise ValueError(
            f"SLURM_NODEID={node} and SLURM_LOCALID={local_rank} do not fit the {_listed(sizes)} tasks on the step's "
            f"{len(sizes)} nodes: start the job with srun"
        )
    return SlurmTask(rank, world_size, local_rank, node, sizes)


def _is_batch_script() -> bool:
    """Whether this process runs in the script of sbatch itself, which has a task's number too but is one process."""
    return os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in os.environ


def _het_groups() -> tuple[int, ...]:
    """Tasks of every group of a heterogeneous job; empty: it is none."""
    count = env_int("SLURM_HET_SIZE") or 0
    sizes = [env_int(f"SLURM_NTASKS_HET_GROUP_{number}") for number in range(min(count, 1024))]
    return tuple(size for size in sizes if size is not None)


def _node_sizes(world_size: int, groups: tuple[int, ...]) -> tuple[int, ...]:
    """Tasks on every node of a step."""
    texts = [os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_TASKS_PER_NODE", "")]
    # All groups of a heterogeneous job in one step: their nodes one after the other.
    per_group = [os.environ.get(f"SLURM_TASKS_PER_NODE_HET_GROUP_{number}", "") for number in range(len(groups))]
    texts.insert(1, ",".join(per_group) if all(per_group) else "")
    for text in texts:
        sizes = tasks_per_node(text) if text else ()
        # What the allocation says is of no use to a step with another number of tasks.
        if sizes and sum(sizes) == world_size:
            return sizes
    nodes = env_int("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    if world_size % nodes:
        raise ValueError(
            f"{world_size} tasks on {nodes} nodes, and SLURM_TASKS_PER_NODE does not say how many on each: start the "
            "job with srun"
        )
    return (world_size // nodes,) * nodes


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Slurm's short form of numbers: "2(x3),1" -> (2, 2, 2, 1).

    Raises:
        ValueError: it is something else.
    """
    sizes: list[int] = []
    for part in text.split(","):
        match = _RUN_OF_NODES.fullmatch(part.strip())
        if match is None or int(match[1]) < 1:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text!r}: expected numbers as in '2(x3),1'; srun sets it")
        sizes += [int(match[1])] * min(int(match[2] or 1), 1_000_000)
    return tuple(sizes)


def _node_of(rank: int, sizes: tuple[int, ...]) -> int:
    """The node of a rank where ranks fill node after node."""
    for node, size in enumerate(sizes):
        if rank < size:
            return node
        rank -= size
    raise AssertionError(f"{rank} more ranks than {sizes}")


def _listed(sizes: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, sizes[:8]))
    return shown if len(sizes) <= 8 else f"{shown}, ..."


def slurm_port() -> int:
    """A port for the ranks to meet: the same on all tasks of a step, another for other steps and jobs on the machine.

    Raises:
        ValueError: the job has no number.
    """
    job = env_int("SLURM_JOB_ID", "SLURM_JOBID")
    if job is None:
        raise ValueError("SLURM_JOB_ID is not set, so the ranks have no port to meet at: export MASTER_PORT")
    return _FIRST_PORT + (job + _STEP_STRIDE * (env_int("SLURM_STEP_ID", "SLURM_STEPID") or 0)) % _NUM_PORTS


def slurm_first_host() -> str:
    """The step's first host, where rank 0 runs.

    Raises:
        ValueError: no variable names hosts, or it cannot be read.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    for name in names:
        if os.environ.get(name):
            return first_host(os.environ[name])
    raise ValueError("SLURM_NODELIST is not set, so the ranks do not know where rank 0 is: export MASTER_ADDR")


def step_hosts() -> list[str]:
    """All hosts of the step in order, as ``scontrol show hostnames`` names them; empty where it cannot be asked."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    return _told_by_scontrol(next((os.environ[name] for name in names if os.environ.get(name)), ""))


def first_host(node_list: str) -> str:
    """First host of a Slurm node list: "n[03-05,9],m1" -> "n03", "r[1-2]n[3-4]" -> "r1n3", "g[1-4]-ib" -> "g1-ib".

    Raises:
        ValueError: it is not such a list.
    """
    told = _told_by_scontrol(node_list)
    return told[0] if told else _first_of(node_list)


def _told_by_scontrol(node_list: str) -> list[str]:
    """What ``scontrol show hostnames`` says; nothing where there is no Slurm, or it does not know this form."""
    scontrol = shutil.which("scontrol")
    if scontrol is None or not node_list.strip() or node_list.startswith("-"):
        return []
    command = [scontrol, "show", "hostnames", node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _first_of(node_list: str) -> str:
    try:
        host = _first_name(node_list)
    except IndexError:
        host = ""
    if not re.fullmatch(r"[\w.:-]+", host):
        raise ValueError(
            f"{node_list!r} is not a list of hosts as Slurm writes it (n[1-3],m4): export MASTER_ADDR with the name of "
            "the first"
        )
    return host


def _first_name(text: str) -> str:
    """The first name of a list, every bracket replaced by the first of its numbers.

    Raises:
        IndexError: there is none, or a bracket is not closed.
    """
    names = [part.strip() for part in _split(text, ",") if part.strip()]
    name = names[0]
    while "[" in name:
        start = name.index("[")
        end = start + _split_at_close(name[start:])
        number = _split(_first_name(name[start + 1 : end]), "-")[0]
        if not number:
            raise IndexError(text)
        name = name[:start] + number + name[end + 1 :]
    return name


def _split_at_close(text: str) -> int:
    """Where the bracket that a text begins with ends."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth == 0:
            return place
    raise IndexError(text)


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
