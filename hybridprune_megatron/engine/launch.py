"""Who started this process: torchrun, srun, or nobody. Light: read before torch is imported.

Processes are always started from outside; one process needs no launcher at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hybridprune_megatron.engine.slurm import env_int, first_host, slurm_first_host, slurm_port, slurm_task

__all__ = ["Launch", "check_launch", "first_host", "launch_overrides", "read_launch"]


@dataclass(frozen=True)
class Launch:
    """Where this process stands in the job.

    Attributes:
        rank: of all processes, from 0.
        world_size: processes of the job.
        local_rank: of the processes on this machine, from 0.
        local_world_size: processes on this machine.
        main_address: rank 0's machine.
        main_port: its port; 0: none is needed (one process).
        launcher: "torchrun", "srun" or "none".
        node: this machine's number; None: ranks fill one machine after the other.
        node_sizes: processes on every machine; empty: as many as here on each.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    main_address: str = "127.0.0.1"
    main_port: int = 0
    launcher: str = "none"
    node: int | None = field(default=None, compare=False)
    node_sizes: tuple[int, ...] = field(default=(), compare=False)

    @property
    def num_nodes(self) -> int:
        """Machines in the job."""
        return len(self.node_sizes) or max(1, self.world_size // self.local_world_size)

    @property
    def node_rank(self) -> int:
        """This machine's number in the job."""
        return self.rank // self.local_world_size if self.node is None else self.node


def read_launch() -> Launch:
    """Reads what the launcher (torchrun or srun) left in the environment; a single process when there is
    none.

    Raises:
        ValueError: one line, if variables are missing, are not numbers, or cannot all be true.
    """
    rank, world_size = env_int("RANK"), env_int("WORLD_SIZE")
    if rank is not None and world_size is not None:
        return _torchrun(rank, world_size)
    if (rank or 0) > 0 or (world_size or 1) > 1:
        there, missing = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
        raise ValueError(
            f"{there}={os.environ[there]} is set but {missing} is not; start the job with torchrun, or unset {there}"
        )
    task = slurm_task()
    if task is None:
        return Launch()
    return Launch(
        task.rank,
        task.world_size,
        task.local_rank,
        task.node_sizes[task.node],
        os.environ.get("MASTER_ADDR") or slurm_first_host(),
        _port() or slurm_port(),
        "srun",
        task.node,
        task.node_sizes,
    )


def _torchrun(rank: int, world_size: int) -> Launch:
    """The launch that torchrun's variables describe."""
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not; start the job with torchrun")
    local_rank, local_size = env_int("LOCAL_RANK") or 0, env_int("LOCAL_WORLD_SIZE") or world_size
    if not (rank < world_size and local_rank < local_size <= world_size and local_rank <= rank):
        raise ValueError(
            f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size} cannot all "
            "be true; start the job with torchrun"
        )
    machines = env_int("GROUP_WORLD_SIZE")
    if machines and machines * local_size != world_size:
        raise ValueError(
            f"torchrun started {local_size} of {world_size} processes on this one of {machines} machines: "
            "trainer.num_nodes x trainer.devices needs as many on each; give the same --nproc_per_node everywhere"
        )
    _check_against_slurm(rank, world_size, local_size)
    address, port = os.environ["MASTER_ADDR"], _port() or 0
    return Launch(rank, world_size, local_rank, local_size, address, port, "torchrun", env_int("GROUP_RANK"))


def _check_against_slurm(rank: int, world_size: int, local_size: int) -> None:
    """Refuses variables of torchrun that were left from elsewhere, in a task that srun started.

    Raises:
        ValueError: every task would take itself for the same rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A running torchrun has just set them, and numbers its machines by itself.
        return
    task = slurm_task()
    if task is None or (rank, world_size) == (task.rank, task.world_size):
        return
    one_torchrun_per_task = world_size == local_size * task.world_size and rank // local_size == task.rank
    if not one_torchrun_per_task:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world_size} contradict Slurm's task {task.rank} of {task.world_size}: unset "
            "RANK and WORLD_SIZE to let srun start the ranks, or start one torchrun per node"
        )


def _port() -> int | None:
    """MASTER_PORT; None: not set."""
    port = env_int("MASTER_PORT")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"MASTER_PORT={port}: must be from 1 to 65535; unset it, or export a free port")
    return port


def check_launch(launch: Launch, num_nodes: int, devices: int) -> None:
    """Refuses a job that asks for another number of processes than were started.

    Raises:
        ValueError: naming both counts and the command that starts the right number.
    """
    wanted = num_nodes * devices
    if wanted != launch.world_size:
        raise ValueError(
            f"trainer.num_nodes x trainer.devices = {num_nodes} x {devices} processes, {launch.world_size} were "
            f"started; run `torchrun --nnodes {num_nodes} --nproc_per_node {devices} recipes/finetune.py` or use srun"
        )


def launch_overrides(launch: Launch, overrides: list[str]) -> list[str]:
    """Hydra overrides that make trainer.num_nodes and trainer.devices what the launcher started, where not
    given by hand.

    So that ``torchrun --nproc_per_node 2 recipes/finetune.py parallel.tensor=2`` says everything once.

    Raises:
        ValueError: the machines have different numbers of processes, which those two keys cannot describe.
    """
    if launch.launcher == "none":
        return []
    if len(set(launch.node_sizes)) > 1:
        raise ValueError(
            f"{launch.launcher} started {', '.join(map(str, launch.node_sizes[:8]))} processes on its "
            f"{launch.num_nodes} machines: trainer.num_nodes x trainer.devices needs as many on each; give "
            "--ntasks-per-node (and in a heterogeneous job the same in every group)"
        )
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    wanted = {"trainer.num_nodes": launch.num_nodes, "trainer.devices": launch.local_world_size}
    return [f"{key}={value}" for key, value in wanted.items() if key not in given]
