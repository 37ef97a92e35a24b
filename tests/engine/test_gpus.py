"""A job that was given GPUs and cannot use them ends in one line instead of training on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.engine import gpus


class Driver:
    """What of libcuda is called."""

    def __init__(self, init: int = 0, version: int = 13000, count: int = 8) -> None:
        self.init, self.version, self.count = init, version, count

    def cuInit(self, _flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, pointer) -> int:
        pointer._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, pointer) -> int:
        pointer._obj.value = self.count
        return 0


@pytest.fixture
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("SLURM") or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1 names GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_STEP_GPUS": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1,2"}, "Slurm gave GPUs (SLURM_JOB_GPUS=0,1,2)"),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}, "Slurm gave GPUs (SLURM_GPUS_ON_NODE=8)"),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_who_gave_gpus(nothing_given, tmp_path, environment: dict[str, str], given: str | None) -> None:
    nothing_given.setattr(gpus, "_DRIVER", tmp_path / "none")
    for name, value in environment.items():
        nothing_given.setenv(name, value)
    assert gpus.given_gpus() == given


def test_those_of_the_machine_count_outside_of_slurm(nothing_given, tmp_path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    nothing_given.setattr(gpus, "_DRIVER", tmp_path)
    assert gpus.given_gpus() == "this machine has 1 GPU(s)"
    # A job without GPUs on a node that has some.
    nothing_given.setenv("SLURM_JOB_ID", "7")
    assert gpus.given_gpus() is None


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(), None),
        (Driver(init=100), r"the driver does not start \(cuInit: error 100\)"),
        (Driver(version=12080), r"the driver offers CUDA 12\.8 and torch is built for CUDA 13\.0"),
        (Driver(count=0), "the driver sees none"),
        (None, r"the driver's library libcuda\.so\.1 is not there"),
    ],
)
def test_why_they_cannot_be_used(nothing_given, driver: Driver | None, reason: str | None) -> None:
    def load(_name: str) -> Driver:
        if driver is None:
            raise OSError
        return driver

    nothing_given.setattr(gpus, "ctypes", SimpleNamespace(**vars(gpus.ctypes) | {"CDLL": load}))
    nothing_given.setattr(gpus, "torch_cuda", lambda: (13, 0))
    nothing_given.setenv("CUDA_VISIBLE_DEVICES", "3")
    if reason is None:
        gpus.check_gpus()
        return
    with pytest.raises(ValueError, match=f"^CUDA_VISIBLE_DEVICES=3 names GPUs, but {reason}: .*CUDA_VISIBLE_DEVICES= "):
        gpus.check_gpus()


def test_the_version_is_that_of_the_installed_torch() -> None:
    import torch

    expected = None if torch.version.cuda is None else tuple(map(int, torch.version.cuda.split(".")))
    assert gpus.torch_cuda() == expected


def test_a_job_ends_in_one_line_within_seconds(tmp_path) -> None:
    # Of no machine, with GPUs or without.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "99"}
    with ShardWriter(tmp_path / "data", "train") as writer:
        for key in ("a", "b"):
            writer.add(key, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], [], {})
    data = [f"data.train={tmp_path}/data", "data.validation=null"]
    command = [sys.executable, "recipes/finetune.py", "experiment=demo", f"output_dir={tmp_path}/run", *data]
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hybridprune finetune: CUDA_VISIBLE_DEVICES=99 names GPUs, but ")
    assert not (tmp_path / "run").exists()
    # Neither torch nor megatron is imported for it, which alone take longer.
    assert time.monotonic() - start < 30
