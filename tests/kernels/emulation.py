"""The CUDA operators compiled for the CPU, so that the kernels' own code is tested where there is no GPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "kernels" / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O2", "-w", "-fPIC", "-fno-strict-aliasing", "-DHP_ON_CPU", f"-I{HERE}"]


class Emulated:
    """``torch.ops.hybridprune`` as the kernels for GPUs compute it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.hybridprune_emulated, name)

    def attention_score(self, q, k, *inputs):
        *inputs, pooling = inputs
        return self.attention_mass(q, k, self.attention_log_sum(q, k, *inputs), *inputs, pooling)


@cache
def emulated() -> Emulated:
    """Builds the library where its sources are new (20 s), and loads it."""
    sources = sorted(CUDA.glob("*.cu")) + [CUDA / "launch.cpp"]
    read = [*sources, *CUDA.glob("*.h"), *CUDA.glob("*.cuh"), *CUDA.parent.glob("*.h"), HERE / "cuda_on_cpu.h"]
    state = b"".join(path.read_bytes() for path in sorted(read)) + f"{torch.__version__} {FLAGS}".encode()
    folder = ROOT / "build" / f"emulated_{hashlib.sha256(state).hexdigest()[:16]}"
    library = folder / "emulated.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may build it too: each on its own, and what is there is whole.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            _build(sources, Path(own) / library.name)
            os.replace(Path(own) / library.name, library)
    torch.ops.load_library(library)
    return Emulated()


def _build(sources: list[Path], library: Path) -> None:
    headers = [f"-I{path}" for path in include_paths("cpu")]
    running = []
    for source in sources:
        command = ["g++", "-x", "c++", *FLAGS, *headers, "-c", str(source), "-o", f"{library}.{source.stem}.o"]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for source, process in zip(sources, running):
        _, errors = process.communicate()
        assert process.returncode == 0, f"{source.name}: {errors[-3000:]}"
    objects = [f"{library}.{source.stem}.o" for source in sources]
    folders = [f"-L{path}" for path in library_paths("cpu")]
    subprocess.run(
        ["g++", "-shared", *objects, "-o", str(library), *folders, "-ltorch", "-ltorch_cpu", "-lc10"], check=True
    )
