"""Device, driver and versions of what a GPU runs, as JSON: ``python -m scripts.gpu_versions FOLDER``."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Of the packages that are installed, and of the driver."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        found["driver"] = done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        found["driver"] = "no nvidia-smi"
    return found


def importable() -> dict[str, str]:
    """Whether compiled packages load with the torch that is here: "yes", or the line that they end with."""
    found = {}
    for name in (
        "hybridprune_kernels",
        "transformer_engine.pytorch",
        "mamba_ssm.ops.triton.ssd_combined",
        "causal_conv1d",
    ):
        try:
            importlib.import_module(name)
            found[name] = "yes"
        # Whatever they raise is the answer.
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def report() -> dict[str, Any]:
    """All of it; the device is the GPU's name, or the processor's."""
    import torch

    from hybridprune_megatron.evaluation.machine import device_name

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "device": device_name(),
        "gpus": [
            {"name": gpu.name, "gib": round(gpu.total_memory / 2**30, 2), "sm": gpu.major * 10 + gpu.minor}
            for gpu in gpus
        ],
        "cuda": torch.version.cuda,
        "versions": versions(),
        "importable": importable(),
    }


@one_line_errors("gpu_versions")
def main(argv: list[str]) -> None:
    """Writes the report into a folder, and prints it."""
    text = json.dumps(report(), indent=1)
    (Path(argv[0]) / "versions.json").write_text(text + "\n", encoding="ascii")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
