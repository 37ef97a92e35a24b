"""Builds what a GPU machine without network lacks, into one archive; for `scripts/gpu_day_one.sh prepare`.

    scripts/gpu_day_one.sh prepare --there packages.txt     # names that are there, one per line, as pip list prints
    scripts/gpu_day_one.sh prepare --archs "9.0;10.0" --convolution

The native operators for its GPU, mamba_ssm's Python (its kernels are Triton's), causal-conv1d's kernels if asked for
(minutes more), this project's Python packages that are not there, and the demo's clips. That machine has its own
torch: of the same minor version as the one here, or the operators say so in one line when they are loaded. Transformer
Engine is too large to bring.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybridprune_megatron.config.one_line import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "gpu_day_one.tar.xz"
SOURCES = Path(sys.prefix) / "gpu_sources"
LIMIT = 64 * 2**20
#: What the steps import besides this project.
ROOTS = ("hybridprune-megatron", "pytest", "pytest-timeout")
#: Of the machine, whatever it has: compiled for its driver, or larger than the limit.
OF_THE_MACHINE = ("torch",)
#: Of a step's packages that no step loads.
UNUSED = ("hybridprune-megatron", "tensorboard", "scikit-video", "s3fs", "aiobotocore", "botocore", "wandb")


def needed(names: Iterable[str], requires: Callable[[str], Sequence[str]]) -> set[str]:
    """Packages and all that they ask for here, by their canonical names.

    Args:
        names: to start from.
        requires: requirements of a package, as its metadata has them.
    """
    found: set[str] = set()
    looked_at: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        found.add(name)
        # What it asks for without an extra, and with each that is asked of it.
        for extra in {"", *wanted.extras} - {extra for known, extra in looked_at if known == name}:
            looked_at.add((name, extra))
            asked = map(Requirement, requires(name))
            waiting += [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def requirements_of(name: str) -> list[str]:
    """What an installed package asks for; nothing, if it is not installed."""
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def missing_there(there: Iterable[str]) -> list[str]:
    """Packages that the steps need and the machine lacks."""
    present = {canonicalize_name(name) for name in (*there, *UNUSED)} | needed(OF_THE_MACHINE, requirements_of)
    return sorted(needed(ROOTS, requirements_of) - present)


def copy_package(name: str, site: Path) -> int:
    """Copies the files of an installed package; their bytes.

    Raises:
        ValueError: it is not installed here.
    """
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise ValueError(f"{name} is needed and not installed here: make setup") from None
    size = 0
    for file in files:
        source = Path(str(file.locate()))
        # Console scripts and caches.
        if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        size += source.stat().st_size
    return size


def copy_mamba(site: Path) -> None:
    """mamba_ssm's Python, without the import of Mamba-1's compiled kernels.

    Raises:
        ValueError: its source is not there.
    """
    source = source_of("mamba_ssm")
    shutil.copytree(source / "mamba_ssm", site / "mamba_ssm", dirs_exist_ok=True)
    (site / "mamba_ssm" / "__init__.py").write_text('"""Brought along for its Triton kernels."""\n')


def source_of(package: str) -> Path:
    """The unpacked source package.

    Raises:
        ValueError: ``make setup`` could not fetch it.
    """
    found = [path for path in sorted(SOURCES.glob(f"{package}-*")) if path.is_dir()]
    if not found:
        raise ValueError(f"no source of {package} in {SOURCES}: make setup takes it from the package index")
    return found[-1]


def only_archs(setup: str, archs: Sequence[str]) -> str:
    """causal-conv1d's setup.py, which compiles for every GPU there is, for some alone.

    Args:
        archs: such as "90".

    Raises:
        ValueError: it names none of them, so it must be looked at again.
    """
    pattern = re.compile(r"^( *)cc_flag\.append\(\"arch=compute_(\d+),code=sm_\d+\"\)\n", re.MULTILINE)
    if not {found.group(2) for found in pattern.finditer(setup)} >= set(archs):
        raise ValueError(f"causal-conv1d's setup.py does not compile for {', '.join(archs)}: leave --convolution out")
    flag = re.compile(rf"^ *cc_flag\.append\(\"-gencode\"\)\n{pattern.pattern[1:]}", re.MULTILINE)
    return flag.sub(lambda found: found.group(0) if found.group(2) in archs else f"{found.group(1)}pass\n", setup)


def install(source: Path, site: Path, environment: dict[str, str]) -> None:
    """Compiles a package into a folder; says in one line that it failed, after the compiler's lines.

    Raises:
        ValueError: it does not compile.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--upgrade", "--target", str(site), str(source)]
    if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode:
        raise ValueError(f"{source.name} could not be built; see above")


def pack(folder: Path, out: Path, limit: int = LIMIT) -> int:
    """Archives a folder; its bytes.

    Raises:
        ValueError: it is larger than the limit; names what is largest in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz", preset=6) as archive:
        archive.add(folder, ".")
    size = out.stat().st_size
    if size > limit:
        out.unlink()
        sizes = {path.name: _bytes(path) for path in folder.glob("*/*")}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
        named = ", ".join(f"{name} {sizes[name] / 2**20:.0f}" for name in largest)
        raise ValueError(
            f"{out.name} would take {size / 2**20:.0f} MiB, allowed are {limit / 2**20:.0f}; unpacked the largest are "
            f"{named} MiB: name with --there what the machine has"
        )
    return size


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())


@one_line_errors("gpu_day_one prepare")
def main(argv: list[str] | None = None) -> None:
    """Builds and packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--there", type=Path, help="names of packages that the machine has, one per line")
    parser.add_argument("--archs", default="9.0", help='of its GPU, such as "9.0" (default, H100 and H200)')
    parser.add_argument("--convolution", action="store_true", help="compile causal-conv1d too")
    parser.add_argument("--out", type=Path, default=OUT, help="archive (default build/gpu_day_one.tar.xz)")
    options = parser.parse_args(argv)
    lines = options.there.read_text().splitlines() if options.there else []
    there = [re.split(r"[ =,]", line.strip())[0] for line in lines if line.strip()]
    folder = options.out.parent / "gpu_day_one.parts"
    shutil.rmtree(folder, ignore_errors=True)
    site = folder / "site"
    site.mkdir(parents=True)
    for name in missing_there(there):
        print(f"{copy_package(name, site) / 2**20:7.1f} MiB  {name}", flush=True)
    copy_mamba(site)
    print(f"compiling the native operators for {options.archs}", flush=True)
    install(ROOT / "kernels", site, {"HYBRIDPRUNE_CUDA": "1", "HYBRIDPRUNE_CUDA_ARCHS": options.archs})
    if options.convolution:
        source = folder / "causal_conv1d"
        shutil.copytree(source_of("causal_conv1d"), source)
        setup = source / "setup.py"
        setup.write_text(only_archs(setup.read_text(), [arch.replace(".", "") for arch in options.archs.split(";")]))
        install(source, site, {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE"})
        shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "scripts.gpu_resume", str(folder), "data"], cwd=ROOT, check=True)
    size = pack(folder, options.out)
    shutil.rmtree(folder)
    print(f"{options.out}: {size / 2**20:.1f} MiB; scripts/gpu_day_one.sh unpacks it where it lies in build/")


if __name__ == "__main__":
    main(sys.argv[1:])
