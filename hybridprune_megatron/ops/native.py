"""Whether the native operators of ``kernels/`` do the work or plain torch does.

They equal the plain torch beside which they stand but for the rounding of float32 sums. This module alone asks whether
they are installed; ``HYBRIDPRUNE_KERNELS=0`` in the environment turns them off.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PACKAGE = "hybridprune_kernels"
# The schemas that the calls below are made for.
_INTERFACE = 3
_VARIABLE = "HYBRIDPRUNE_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16)


def native(*values: Tensor) -> Any | None:
    """``torch.ops.hybridprune``, or None where plain torch is to do it.

    Args:
        values: what would be read; the operators know float32 and bfloat16, on CPUs and on GPUs they were built for.

    Raises:
        ImportError: what is installed does not fit this torch or this code.
        ValueError: the variable has a value that nobody knows.
    """
    setting = os.environ.get(_VARIABLE, "1")
    if setting not in ("0", "1"):
        raise ValueError(
            f"{_VARIABLE}={setting!r}: allowed are 1 (native operators where installed) and 0 (plain torch)"
        )
    device = values[0].device
    if setting == "0" or device.type not in ("cpu", "cuda") or any(each.dtype not in _DTYPES for each in values):
        return None
    if torch.compiler.is_compiling():
        # Plain torch is what a compiler can fuse.
        return None
    package = _package()
    if package is None or (device.type == "cuda" and not _has_code_for(device)):
        return None
    return torch.ops.hybridprune


def native_on_cpu(*values: Tensor) -> Any | None:
    """As ``native``, for the operators of a layer: for float32 on CPUs only, where a GPU has kernels of others."""
    if any(each.device.type != "cpu" or each.dtype != torch.float32 for each in values):
        return None
    return native(*values)


@cache
def _package() -> Any | None:
    """The package with the operators; None: it is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None
    # Not an import statement: transformers demands of an export whatever its code imports by one.
    package = importlib.import_module(_PACKAGE)
    if package.INTERFACE != _INTERFACE:
        raise ImportError(
            f"{_PACKAGE} has operators of interface {package.INTERFACE}, this code calls {_INTERFACE}: install the "
            f"kernels/ of the same release, or set {_VARIABLE}=0"
        )
    return package


@cache
def _has_code_for(device: torch.device) -> bool:
    """Whether the operators were built for a GPU; says so once if not."""
    package = _package()
    assert package is not None, "asked for the code of a package that is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    built = any(int(arch) <= 10 * major + minor for arch in package.CUDA_ARCHS)
    if not built:
        warnings.warn(
            f"{_PACKAGE} is built for CUDA {list(package.CUDA_ARCHS)}, the GPU has {major}.{minor}: scores are "
            "computed in plain torch; build it again with HYBRIDPRUNE_CUDA=1",
            stacklevel=2,
        )
    return built
