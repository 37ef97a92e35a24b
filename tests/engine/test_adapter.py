"""The CPU adapter: what it answers, and that a GPU keeps it off."""

from __future__ import annotations

import random

import pytest

from tests.worlds import run_world


def _cpu_answers() -> None:
    import torch
    from megatron.core import tensor_parallel

    from hybridprune_megatron.engine import cpu_adapter, ensure_device_backend

    assert ensure_device_backend() == "gloo"
    before = torch.zeros
    cpu_adapter.activate()
    assert torch.zeros is before
    assert cpu_adapter.is_active()
    assert torch.cuda.is_available() is False
    for made in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.ones(1).to("cuda:0"),
        torch.ones(1).cuda(),
        torch.empty(1, device=torch.cuda.current_device()),
    ):
        assert made.device.type == "cpu"
    # Only megatron's optimizers are told that a tensor is on a GPU.
    assert torch.ones(1).type() == "torch.FloatTensor"
    scope: dict = {"__name__": "megatron.core.optimizer.made_up", "x": torch.ones(1)}
    exec("answer = x.type()", scope)
    assert scope["answer"] == "torch.cuda.FloatTensor"
    # What megatron decorates with torch.compile runs as it is written.
    from megatron.core.activations import squared_relu
    from torch._dynamo.utils import counters

    assert squared_relu(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]
    assert not counters["frames"]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    # A fork of megatron's tracker leaves the outer generator as it was, and continues where it stopped.
    from hybridprune_megatron.engine.parallel import init_model_parallel

    init_model_parallel(seed=11)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork():
        assert not torch.equal(torch.rand(3), first)


def test_megatron_finds_a_cpu() -> None:
    run_world(1, _cpu_answers)


def _seeds() -> list[float]:
    import numpy as np
    import torch

    from hybridprune_megatron.engine.parallel import init_model_parallel

    init_model_parallel(seed=11)
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_seed_reaches_every_generator() -> None:
    first, second = run_world(2, _seeds)
    assert first == second == run_world(1, _seeds)[0]


def _activate_beside_a_gpu() -> str:
    import torch

    from hybridprune_megatron.engine import cpu_adapter

    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="on a machine with a CUDA device"):
        cpu_adapter.activate()
    # run_world itself has switched it on for this process, when no GPU was seen yet.
    return "refused"


def test_refuses_a_machine_with_a_gpu() -> None:
    assert run_world(1, _activate_beside_a_gpu) == ["refused"]


def _wrong_split() -> None:
    from hybridprune_megatron.engine.parallel import init_model_parallel

    init_model_parallel(tensor=3)


def test_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 x 1 x 1 does not divide the 2 processes"):
        run_world(2, _wrong_split)


def _fail_on_rank_1() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise KeyError("from rank 1")
    dist.barrier()


def test_a_world_reports_the_rank_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*from rank 1"):
        run_world(2, _fail_on_rank_1)
