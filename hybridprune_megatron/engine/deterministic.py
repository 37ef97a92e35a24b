"""``trainer.deterministic``: the same digits in every run of one layout, on GPUs (CPUs have them). Light: no torch."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from hybridprune_megatron.checks import fail

if TYPE_CHECKING:
    import torch

#: Variable -> what it may be under the key, the first of them if it is not set. Libraries read them when they load.
VARIABLES: dict[str, tuple[str, ...]] = {
    # A workspace of fixed buffers: products on several streams choose the same algorithm.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Transformer Engine's attention, whose fast backward adds up in the order in which blocks arrive.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # Sums over ranks in one order, whatever a run measures of its links.
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    # One configuration of mamba_ssm's Triton kernels instead of the fastest of a timing run.
    "MAMBA_DETERMINISTIC": ("1",),
}


def prepare(wanted: bool, environment: MutableMapping[str, str]) -> None:
    """Sets what libraries read; before torch is imported.

    Args:
        wanted: ``trainer.deterministic``; False leaves everything as it is.
        environment: changed in place, ``os.environ``.

    Raises:
        ConfigError: a variable is set to something else.
    """
    if not wanted:
        return
    for name, allowed in VARIABLES.items():
        value = environment.setdefault(name, allowed[0])
        if value not in allowed:
            reason = f"{name}={value} in the environment contradicts it (allowed: {', '.join(allowed)})"
            raise fail("trainer.deterministic", "true", reason, f"unset {name}, or set trainer.deterministic=false")


def choose_algorithms(wanted: bool, device: torch.device) -> None:
    """Has torch refuse what has no deterministic algorithm on a GPU; nothing changes on a CPU."""
    import torch

    if wanted and device.type == "cuda":
        torch.use_deterministic_algorithms(True)
