"""The CUDA sources compile for every architecture that the nvcc here knows, and no kernel spills."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("inspect_cuda", ROOT / "kernels" / "inspect_cuda.py")
inspect_cuda = importlib.util.module_from_spec(spec)
# Dataclasses look their module up.
sys.modules[spec.name] = inspect_cuda
spec.loader.exec_module(inspect_cuda)

LOG = """ptxas info    : Compiling entry function '_Z5smallPf' for 'sm_80'
ptxas info    : Function properties for _Z5smallPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 37184 bytes smem, 472 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5smallPf' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_what_the_assembler_says_is_read():
    first, second = inspect_cuda.kernels_of(LOG)
    assert (first.arch, first.registers, first.shared, first.spilled) == ("80", 64, 37184, 16)
    assert (second.arch, second.registers, second.shared, second.spilled) == ("90", 32, 0, 0)


def fake_nvcc(folder: Path, *codes: str) -> str:
    """An nvcc that only lists what it can compile for."""
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\n" + "".join(f"echo {code}\n" for code in codes))
    path.chmod(0o755)
    return str(path)


def test_an_older_nvcc_is_not_asked_for_newer_gpus(tmp_path):
    assert inspect_cuda.known_archs(fake_nvcc(tmp_path, "sm_80", "sm_90", "sm_90a")) == ("80", "90")
    assert inspect_cuda.known_archs(fake_nvcc(tmp_path, "sm_80", "sm_90", "sm_100", "sm_120")) == ("80", "90", "100")


#: Of a thread; blocks have at most 256 of them, and a multiprocessor 65,536 registers for two such blocks.
MOST_REGISTERS = 128


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, no GPU")
@pytest.mark.parametrize("name", ["attention", "mamba", "select"])
def test_no_kernel_spills(name):
    nvcc = shutil.which("nvcc")
    kernels = inspect_cuda.compiled(inspect_cuda.SOURCES / f"{name}.cu", nvcc)
    assert {kernel.arch for kernel in kernels} == set(inspect_cuda.known_archs(nvcc))
    # A kernel with more shared memory than 48 KiB is refused at launch.
    assert [kernel for kernel in kernels if kernel.spilled or kernel.shared > 48 * 1024] == []
    assert [kernel for kernel in kernels if kernel.registers > MOST_REGISTERS] == []
