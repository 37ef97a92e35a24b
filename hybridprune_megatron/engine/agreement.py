"""All processes of a job run the same configuration (and seed), the same versions, at nearly the same time."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from hybridprune_megatron.config.flat import config_values

#: Nothing is computed from the clock; logs and files of machines that differ by more are hard to read together.
_MAX_CLOCK_SECONDS = 60.0


def check_agreement(cfg: Any, versions: dict[str, str]) -> None:
    """Refuses a job whose processes were started with different settings. Every rank calls it.

    Args:
        cfg: this rank's configuration, a dataclass.
        versions: this rank's library versions.

    Raises:
        ValueError: on every rank, naming the first rank, key and value that differ from rank 0.
    """
    own = config_values(cfg)
    own |= {f"version of {name}": version for name, version in versions.items()}
    common: list[Any] = [own]
    dist.broadcast_object_list(common, src=0)
    keys = sorted(key for key in own.keys() | common[0].keys() if own.get(key) != common[0].get(key))
    line = None
    if keys:
        key, rank = keys[0], dist.get_rank()
        line = (
            f"{key}={own.get(key)} on rank {rank}, {common[0].get(key)} on rank 0: start every process with the same "
            "command and environment"
        )
    said: list[tuple[str | None, float]] = [(None, 0.0)] * dist.get_world_size()
    dist.all_gather_object(said, (line, time.time()))
    for each, _ in said:
        if each is not None:
            raise ValueError(each)
    times = [now for _, now in said]
    if max(times) - min(times) > _MAX_CLOCK_SECONDS and dist.get_rank() == 0:
        latest, earliest = times.index(max(times)), times.index(min(times))
        ahead = f"rank {latest} is {max(times) - min(times):.0f} s ahead of rank {earliest}"
        print(f"clocks differ: {ahead}; the run does not depend on it, its logs do", flush=True)
