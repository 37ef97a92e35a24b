"""Versions and machine, for reports."""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformers", "megatron-energon", "av")


def describe_machine() -> dict[str, Any]:
    """Versions, device, threads and today's date."""
    return {
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    """The GPU, or the processor and the number of its cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unknown processor'}"
