"""mamba_ssm itself on a CPU: its Python, from the source package that `make setup` fetches, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace


def mamba_folder() -> Path | None:
    """Where the unpacked source package is; None: it could not be fetched."""
    return next(iter(sorted((Path(sys.prefix) / "gpu_sources").glob("mamba_ssm-*"))), None)


def install_mamba(folder: Path) -> None:
    """Puts the package where ``import`` finds it, in a process that interprets Triton."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "kernels would be compiled, for a GPU"
    # Its own __init__ imports the compiled kernels of Mamba-1.
    module = ModuleType("mamba_ssm")
    module.__path__ = [str(folder / "mamba_ssm")]
    module.__spec__ = ModuleSpec("mamba_ssm", None, is_package=True)
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules["mamba_ssm"] = module


def pretend_a_device() -> None:
    """What the package asks torch.cuda for; again whenever the CPU adapter has been activated, which says no."""
    import torch

    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)
