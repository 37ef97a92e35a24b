"""Native operators, ``torch.ops.hybridprune``; importing this registers them. README.md has the schemas."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    from hybridprune_kernels import _build
except ImportError as error:
    raise ImportError(
        f"hybridprune_kernels is not built ({error}): pip install --no-build-isolation ./kernels"
    ) from None

#: What the main package asks for; rises when a schema changes.
INTERFACE = 3
#: CUDA architectures of the build, such as ("80", "90"); empty: CPU only.
CUDA_ARCHS: tuple[str, ...] = _build.CUDA_ARCHS


def check_torch(built: str, installed: str) -> None:
    """Refuses a torch of another minor version, whose C++ interface differs, before anything of it is called.

    Raises:
        ImportError: the versions differ.
    """
    if built.split(".")[:2] != installed.split(".")[:2]:
        raise ImportError(
            f"hybridprune_kernels was built against torch {built}, torch {installed} is installed: "
            "pip install --no-build-isolation --force-reinstall --no-deps ./kernels"
        )


def _load() -> None:
    check_torch(_build.TORCH, torch.__version__)
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if len(found) != 1:
        raise ImportError(
            f"hybridprune_kernels has {len(found)} libraries: expected one; "
            "pip install --no-build-isolation --force-reinstall --no-deps ./kernels"
        )
    torch.ops.load_library(found[0])


_load()

# The operators must be there before shapes and gradients are registered for them.
from hybridprune_kernels import registration  # noqa: E402, F401
