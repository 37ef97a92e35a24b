"""Builds the operators: always for the CPU, for CUDA where HYBRIDPRUNE_CUDA says so. README.md has the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# The one version the sources are tested with; the main package pins it.
TORCH = "2.13"
HERE = Path(__file__).resolve().parent
ARCHS = "8.0;9.0"
ALLOWED = ("auto", "0", "1")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"hybridprune-kernels needs torch {TORCH} to build against ({error}): pip install torch==2.13.0"
    ) from None


def say(line: str) -> None:
    """To where pip shows it (with -v) and a failing build prints it."""
    print(f"hybridprune-kernels: {line}", file=sys.stderr)


def check_torch() -> None:
    """Refuses a torch that the sources are not made for."""
    if torch.__version__.split(".")[:2] != TORCH.split("."):
        raise SystemExit(
            f"hybridprune-kernels is for torch {TORCH}, torch {torch.__version__} is installed: "
            "pip install torch==2.13.0"
        )


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or where the nvcc of the PATH is; None: there is no bin/nvcc in it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").is_file() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # The nvcc of the PATH may be a script that calls the toolkit's: it names the folder where it works.
    top = re.search(r"TOP=(\S+)", told_by(nvcc, "--dryrun", "-x", "cu", os.devnull))
    folder = Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]
    return folder if (folder / "bin" / "nvcc").is_file() else None


def toolkit_version(home: Path) -> str:
    """The CUDA version of a toolkit, such as "13.0"; "unknown" where its nvcc does not say."""
    release = re.search(r"release (\d+\.\d+)", told_by(home / "bin" / "nvcc", "--version"))
    return release.group(1) if release else "unknown"


def told_by(*command: str | Path) -> str:
    """What a program prints; nothing if it cannot be run."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return told.stdout + told.stderr


def wants_cuda() -> bool:
    """Whether to build for CUDA, by HYBRIDPRUNE_CUDA: 1, 0, or auto (where nvcc and a CUDA build of torch are)."""
    setting = os.environ.get("HYBRIDPRUNE_CUDA", "auto")
    if setting not in ALLOWED:
        raise SystemExit(f"HYBRIDPRUNE_CUDA={setting!r}: allowed are {', '.join(ALLOWED)}")
    if setting == "0":
        say("building for the CPU only, as HYBRIDPRUNE_CUDA=0 says")
        return False
    missing, home = [], toolkit()
    if home is None:
        missing.append("neither CUDA_HOME nor the PATH leads to the bin/nvcc of a CUDA toolkit")
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    elif home is not None:
        version = toolkit_version(home)
        # torch refuses another major version in the middle of the build.
        if version.split(".")[0] != torch.version.cuda.split(".")[0]:
            missing.append(
                f"nvcc of {home} is of CUDA {version} and torch is built for CUDA {torch.version.cuda} (CUDA_HOME "
                "names another toolkit)"
            )
    if missing and setting == "1":
        raise SystemExit(f"HYBRIDPRUNE_CUDA=1, but {' and '.join(missing)}")
    if missing:
        say(f"building for the CPU only: {' and '.join(missing)}")
        return False
    return True


def architectures() -> list[str]:
    """The numbers of HYBRIDPRUNE_CUDA_ARCHS, such as 80 for "8.0"."""
    setting = os.environ.get("HYBRIDPRUNE_CUDA_ARCHS", ARCHS)
    numbers = [arch.strip().replace(".", "") for arch in setting.split(";")]
    # Below 8.0 there are no bfloat16 products.
    if not all(number.isdigit() and int(number) >= 80 for number in numbers):
        raise SystemExit(f"HYBRIDPRUNE_CUDA_ARCHS={setting!r}: expected numbers from 8.0 on, such as {ARCHS!r}")
    return numbers


def cuda_headers() -> list[str]:
    """Headers of the CUDA version torch was built with, where pip installed them: a bare nvcc lacks some."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"
    return [str(folder)] if folder.is_dir() else []


def extension() -> CppExtension:
    """The library, without a Python module in it: Python loads it through torch."""
    cuda = wants_cuda()
    sources = [HERE / "csrc" / "schema.cpp", *sorted((HERE / "csrc" / "cpu").glob("*.cpp"))]
    flags = {"cxx": ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]}
    options: dict = {"include_dirs": [], "libraries": []}
    if cuda:
        from torch.utils import cpp_extension

        home = toolkit()
        cpp_extension.CUDA_HOME = str(home)
        archs = architectures()
        say(f"building for the CPU and for CUDA {', '.join(archs)} with {home}")
        sources += [*sorted((HERE / "csrc" / "cuda").glob("*.cu")), HERE / "csrc" / "cuda" / "launch.cpp"]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        newest = max(archs, key=int)
        flags["nvcc"] = ["-O3", *codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
        options["include_dirs"] += cuda_headers()
    kind = CppExtension if not cuda else cpp_extension.CUDAExtension
    write_build(architectures() if cuda else [])
    return kind(
        "hybridprune_kernels._native",
        [str(source.relative_to(HERE)) for source in sources],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
        **options,
    )


def write_build(archs: list[str]) -> None:
    """What the library was built with, for the check at import."""
    lines = [
        '"""What this build was made with; written by setup.py."""',
        "",
        f'TORCH = "{torch.__version__}"',
        f"CUDA_ARCHS = {tuple(archs)!r}",
        "",
    ]
    (HERE / "src" / "hybridprune_kernels" / "_build.py").write_text("\n".join(lines), encoding="ascii")


check_torch()
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
