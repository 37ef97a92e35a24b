"""The CUDA sources compile for both architectures, and no kernel spills."""

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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, no GPU")
@pytest.mark.parametrize("name", ["attention", "mamba", "select"])
def test_no_kernel_spills(name):
    kernels = inspect_cuda.compiled(inspect_cuda.SOURCES / f"{name}.cu", shutil.which("nvcc"))
    assert {kernel.arch for kernel in kernels} == set(inspect_cuda.ARCHS)
    # A kernel with more shared memory than 48 KiB is refused at launch.
    assert [kernel for kernel in kernels if kernel.spilled or kernel.shared > 48 * 1024] == []
