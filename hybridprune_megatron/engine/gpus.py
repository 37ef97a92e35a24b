"""Whether GPUs that a job was given can be used. Light: read before torch is imported.

A job of eight GPUs with a driver that is too old, or in a container that was started without them, would otherwise
train on CPUs without a word.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path

#: What CUDA_VISIBLE_DEVICES holds where somebody, or Slurm, hides every GPU.
_NONE = ("", "-1", "NoDevFiles")
#: What srun and sbatch say about GPUs: numbers of devices, or how many.
_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_FIX = "`nvidia-smi` must show them here (driver, `--nv`, `--gpus all`); export CUDA_VISIBLE_DEVICES= to use the CPUs"


def check_gpus() -> int:
    """Raises if this process was given GPUs and cannot use one.

    Returns:
        How many it can use; 0: it was given none.

    Raises:
        ValueError: one line that says who gave them and why they cannot be used.
    """
    given = given_gpus()
    if given is None:
        return 0
    found = _usable()
    if isinstance(found, str):
        raise ValueError(f"{given}, but {found}: {_FIX}")
    return found


def given_gpus() -> str | None:
    """Who gave this process GPUs, in words; None: nobody did, or they are hidden on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return None if visible.strip() in _NONE else f"CUDA_VISIBLE_DEVICES={visible} names GPUs"
    for name in _SLURM:
        value = os.environ.get(name, "").strip()
        if value and (name != "SLURM_GPUS_ON_NODE" or value != "0"):
            return f"Slurm gave GPUs ({name}={value})"
    # In a Slurm job without GPUs those of the machine are somebody else's.
    if "SLURM_JOB_ID" not in os.environ and _DRIVER.is_dir() and any(_DRIVER.iterdir()):
        return f"this machine has {len(list(_DRIVER.iterdir()))} GPU(s)"
    return None


def _usable() -> int | str:
    """GPUs that the driver sees, at least one, or why CUDA cannot be used."""
    built = torch_cuda()
    if built is None:
        return "the installed torch is built without CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the driver's library libcuda.so.1 is not there"
    version, count = ctypes.c_int(), ctypes.c_int()
    if status := driver.cuInit(0):
        return f"the driver does not start (cuInit: error {status})"
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 < built[0]:
        offered = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the driver offers CUDA {offered} and torch is built for CUDA {built[0]}.{built[1]}"
    if status := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the driver cannot count them (cuDeviceGetCount: error {status})"
    return count.value or "the driver sees none"


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA version that the installed torch is built for, read from its file; None: it is built without CUDA."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        found = re.search(r"^cuda\b[^=]*=\s*'(\d+)\.(\d+)'", text, re.MULTILINE)
        if found:
            return int(found[1]), int(found[2])
    return None
