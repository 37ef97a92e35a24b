"""Compiles the CUDA kernels and prints what each needs: registers, shared memory, spills. No GPU is needed.

python kernels/inspect_cuda.py            # sm_80, sm_90 and sm_100; fails where a kernel spills registers to memory
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc" / "cuda"
ARCHS = ("80", "90", "100")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel on one architecture.

    Attributes:
        name: readable, without its arguments.
        arch: such as "90".
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes a thread stores and loads because it has too few registers.
    """

    name: str
    arch: str
    registers: int
    shared: int
    spilled: int


def kernels_of(log: str) -> list[Kernel]:
    """The kernels that ``nvcc --ptxas-options=-v`` writes about, in order."""
    found = []
    # What comes before the first entry belongs to none.
    parts = _ENTRY.split(log)[1:]
    for mangled, arch, text in zip(parts[::3], parts[1::3], parts[2::3]):
        spills, used, shared = _SPILLS.search(text), _USED.search(text), _SHARED.search(text)
        assert spills is not None, f"no spills said of {mangled}: {text}"
        assert used is not None, f"no registers said of {mangled}: {text}"
        spilled = int(spills.group(1)) + int(spills.group(2))
        found.append(Kernel(mangled, arch, int(used.group(1)), int(shared.group(1)) if shared else 0, spilled))
    names = _readable([kernel.name for kernel in found])
    return [Kernel(name, *list(vars(kernel).values())[1:]) for name, kernel in zip(names, found)]


def _readable(mangled: list[str]) -> list[str]:
    """Names as they stand in the source, as far as c++filt is there to tell."""
    if shutil.which("c++filt") is None or not mangled:
        return mangled
    lines = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|hybridprune::cuda::|^void |\(.*", "", line) for line in lines]


def known_archs(nvcc: str) -> tuple[str, ...]:
    """Those of ``ARCHS`` that an nvcc can compile for: sm_100 came with CUDA 12.8."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(arch for arch in ARCHS if f"sm_{arch}" in listed)


def compiled(source: Path, nvcc: str, archs: tuple[str, ...] | None = None) -> list[Kernel]:
    """The kernels of one source.

    Args:
        archs: to compile for; None: all that this nvcc knows of ``ARCHS``.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    archs = known_archs(nvcc) if archs is None else archs
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", *codes, "--ptxas-options=-v", "-Werror=all-warnings", "-c", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{source.name}: {log}")
    return kernels_of(log)


def main() -> int:
    """Prints the table; 1 where a kernel spills, 2 without nvcc."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on the PATH: nothing to inspect", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(2) as pool:
        kernels = [
            k for found in pool.map(lambda path: compiled(path, nvcc), sorted(SOURCES.glob("*.cu"))) for k in found
        ]
    print(f"{'kernel':44} {'sm':>4} {'registers':>10} {'shared B':>9} {'spilled B':>10}")
    for kernel in kernels:
        print(f"{kernel.name:44} {kernel.arch:>4} {kernel.registers:10} {kernel.shared:9} {kernel.spilled:10}")
    spilling = [f"{kernel.name} (sm_{kernel.arch})" for kernel in kernels if kernel.spilled]
    if spilling:
        print(f"these spill: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
