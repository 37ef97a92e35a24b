"""Process groups: torch.distributed, megatron's parallel state and the seeds that depend on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment
from megatron.core import parallel_state, tensor_parallel

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.engine import ensure_device_backend
from hybridprune_megatron.engine.launch import Launch
from hybridprune_megatron.engine.watch import end_watch


class LaunchedEnvironment(ClusterEnvironment):
    """Tells Lightning that the processes exist already, so that it never starts any."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        """Always true: see the module's docstring."""
        return True

    @property
    def main_address(self) -> str:
        """Host name of rank 0."""
        return self._launch.main_address

    @property
    def main_port(self) -> int:
        """Port of rank 0's store."""
        return self._launch.main_port

    @staticmethod
    def detect() -> bool:
        """Never chosen by detection, only passed in."""
        return False

    def world_size(self) -> int:
        """Processes in the job."""
        return self._launch.world_size

    def set_world_size(self, size: int) -> None:
        """Fixed by the launcher."""

    def global_rank(self) -> int:
        """This process's number in the job."""
        return self._launch.rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed by the launcher."""

    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self._launch.local_rank

    def node_rank(self) -> int:
        """This machine's number."""
        return self._launch.node_rank


def init_distributed(launch: Launch, timeout_minutes: float = 30.0, init_method: str | None = None) -> torch.device:
    """Starts torch.distributed (nccl on GPUs, gloo elsewhere) and returns this process's device. Idempotent.

    Args:
        timeout_minutes: how long a collective waits for the others before the job fails.
        init_method: where the ranks meet; default: the launcher's address and port.
    """
    backend = ensure_device_backend()
    device = torch.device("cuda", launch.local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    timeout = timedelta(minutes=timeout_minutes)
    if launch.world_size == 1 and init_method is None:
        # No port and no file: two single-process jobs on one machine cannot meet.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device
    if init_method is None:
        # torchrun holds the store of its own port open, and only env:// joins it.
        torchrun = launch.launcher == "torchrun"
        init_method = "env://" if torchrun else f"tcp://{launch.main_address}:{launch.main_port}"
    dist.init_process_group(
        backend, init_method=init_method, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    return device


def init_model_parallel(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    seed: int = 0,
    timeout_minutes: float = 30.0,
    virtual_pipeline: int = 1,
    expert: int = 1,
) -> None:
    """Builds megatron's groups and seeds every generator (python, numpy, torch, megatron's tracker).
    Idempotent in the groups.

    Args:
        tensor: processes that split each layer's weights.
        pipeline: stages that split the layers.
        context: processes that split the sequence.
        seed: of the run; equal on every rank. Ranks of one tensor group draw different weights from it.
        timeout_minutes: how long a collective of these groups waits for the others before the job fails.
        virtual_pipeline: chunks of layers that each stage holds.
        expert: processes of a stage that share the routed experts.

    Raises:
        ValueError: if the sizes do not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if world_size % (tensor * pipeline * context):
        raise ValueError(
            f"parallel.tensor x parallel.pipeline x parallel.context = {tensor} x {pipeline} x {context} does not "
            f"divide the {world_size} processes of this job; change parallel.* or start a multiple of "
            f"{tensor * pipeline * context}"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            # Experts are whole: a rank's part of the sequence goes to them, not a part of each expert to the rank.
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=timeout_minutes,
            # Megatron wants a second, gloo set of groups beside nccl only for a gathering optimizer format
            # that is not used here.
            create_gloo_process_groups=False,
        )
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seeds python, numpy, torch and megatron's tracker, as far as ranks must differ: by stage and tensor rank."""
    # Stages draw different weights, replicas of a stage the same ones.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def shut_down() -> None:
    """Leaves megatron's groups and torch.distributed; does nothing if they were not started."""
    end_watch()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class DataRank:
    """Which share of the data this process reads: processes of one model replica share a rank."""

    rank: int
    size: int


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank.

    Raises:
        ConfigError: with rank 0's line, on every rank, where that was a ValueError or an OSError.
    """
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = make()
        except (ValueError, OSError) as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise ConfigError(said[1])
    return said[0]


def data_rank() -> DataRank:
    """This process's data-parallel rank and the number of replicas, after :func:`init_model_parallel`."""
    return DataRank(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
