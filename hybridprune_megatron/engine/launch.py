"""Who started this process: torchrun, srun, or nobody. Light: read before torch is imported.

Processes are always started from outside; one process needs no launcher at all.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Where this process stands in the job. Ranks count from 0; ``main_port`` 0: no port is needed (one process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    main_address: str = "127.0.0.1"
    main_port: int = 0
    launcher: str = "none"

    @property
    def num_nodes(self) -> int:
        """Machines in the job."""
        return max(1, self.world_size // self.local_world_size)

    @property
    def node_rank(self) -> int:
        """This machine's number in the job."""
        return self.rank // self.local_world_size


def _env_int(name: str) -> int:
    text = os.environ[name]
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} is not a number; it is set by the launcher") from None


def read_launch() -> Launch:
    """Reads what the launcher (torchrun or srun) left in the environment; a single process when there is
    none.

    Raises:
        ValueError: if a variable is not a number or torchrun's variables are incomplete.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not; start the job with torchrun"
            )
        world_size = _env_int("WORLD_SIZE")
        local = _env_int("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
        return Launch(
            _env_int("RANK"),
            world_size,
            _env_int("LOCAL_RANK"),
            local,
            os.environ["MASTER_ADDR"],
            _env_int("MASTER_PORT"),
            "torchrun",
        )
    # SLURM_STEP_ID alone is also set in an interactive allocation's shell; a task of srun has a local id and
    # a process id too.
    if "SLURM_PROCID" in os.environ and "SLURM_LOCALID" in os.environ and _env_int("SLURM_NTASKS") > 1:
        return Launch(
            _env_int("SLURM_PROCID"),
            _env_int("SLURM_NTASKS"),
            _env_int("SLURM_LOCALID"),
            max(1, _env_int("SLURM_NTASKS") // _env_int("SLURM_NNODES")),
            os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_NODELIST"]),
            # The same on all tasks of a job, different for most jobs that share a node.
            _env_int("MASTER_PORT") if "MASTER_PORT" in os.environ else 20000 + _env_int("SLURM_JOB_ID") % 20000,
            "srun",
        )
    return Launch()


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


def first_host(node_list: str) -> str:
    """First host of a Slurm node list: "n[03-05,9],m1" -> "n03", "n1,n2" -> "n1"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", node_list)
    assert match is not None, node_list
    return match.group(1) + (match.group(2) or "")


def launch_overrides(launch: Launch, overrides: list[str]) -> list[str]:
    """Hydra overrides that make trainer.num_nodes and trainer.devices what the launcher started, where not
    given by hand.

    So that ``torchrun --nproc_per_node 2 recipes/finetune.py parallel.tensor=2`` says everything once.
    """
    if launch.launcher == "none":
        return []
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    wanted = {"trainer.num_nodes": launch.num_nodes, "trainer.devices": launch.local_world_size}
    return [f"{key}={value}" for key, value in wanted.items() if key not in given]
