"""Split models train as the whole one does; weights load into any split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.engine.job import tiny_job
from tests.worlds import run_world

_EXACT = ("samples", "tokens", "loss_tokens", "lr")


def _train(
    weights: str | None, save_to: str | None, tensor: int, pipeline: int, steps: int, distributed: bool, precision: str
) -> list[Any]:
    """Step results of the tiny model; can write the weights it starts from, as a checkpoint and as safetensors."""
    import torch

    from hybridprune_megatron.engine.checkpoint import CheckpointSaver
    from hybridprune_megatron.engine.optimization import allocate_state, build_train_state, micro_batches_per_step
    from hybridprune_megatron.engine.parallel import data_rank, init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.engine.weights import load_initial_weights, save_weights
    from tests.engine.tiny import CountingLoader, tiny_model

    job = tiny_job(Path("unused"), tensor, pipeline, precision=precision)
    job.parallel.distributed_optimizer = distributed
    init_model_parallel(tensor, pipeline, seed=3)
    from megatron.core import parallel_state

    module = tiny_model(
        parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage(), bf16=precision == "bf16"
    )
    if weights is not None:
        load_initial_weights(module, weights)
    if save_to is not None:
        save_weights(module, f"{save_to}/weights.safetensors")
    state = build_train_state(module, job.optim, job.trainer, job.parallel, torch.device("cpu"))
    if save_to is not None:
        allocate_state(state.optimizer)
        CheckpointSaver(Path(save_to)).save(0, state, {}, {}, {})
    where = data_rank()
    batches = iter(CountingLoader(where.rank, where.size))
    count = micro_batches_per_step(job.trainer.global_batch_size)
    # As dicts: unpickling a StepResult would import megatron into pytest's own process.
    results: list[Any] = [asdict(train_step(state, batches, count, 32, step + 1)) for step in range(steps)]
    before = [p.detach().clone() for p in module.parameters()]
    results.append(_evaluation_loss(state.ddp, itertools.islice(batches, 2), 2, 32))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    return results


def _evaluation_loss(chunks: list[Any], batches: Iterator[Any], count: int, length: int) -> tuple[float, int]:
    """Mean loss per loss token over ``count`` micro batches of every replica, and that number of tokens."""
    import torch

    from hybridprune_megatron.engine.train_step import Recorder, summed_losses

    for chunk in chunks:
        chunk.eval()
    recorder = Recorder(batches, torch.device("cpu"))
    with torch.no_grad():
        losses = summed_losses(chunks, recorder, count, length, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return losses.total / max(losses.tokens, 1), losses.tokens


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("weights")
    return folder, run_world(1, _train, None, str(folder), 1, 1, 4, True, "fp32")[0]


@pytest.mark.parametrize("source", ["weights.safetensors", "step_00000000"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_split_equals_whole(whole: tuple[Path, list[Any]], source: str, tensor: int, pipeline: int) -> None:
    folder, expected = whole
    ranks = run_world(2, _train, str(folder / source), None, tensor, pipeline, 4, True, "fp32")
    assert ranks[0] == ranks[1]
    for one, other in zip(ranks[0][:-1], expected[:-1]):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert [one[key] for key in _EXACT] == [other[key] for key in _EXACT]
    assert ranks[0][-1][0] == pytest.approx(expected[-1][0], abs=1e-5)


def test_optimizer_without_distribution(whole: tuple[Path, list[Any]]) -> None:
    folder, expected = whole
    results = run_world(1, _train, str(folder / "weights.safetensors"), None, 1, 1, 4, False, "fp32")[0]
    assert [r["loss"] for r in results[:-1]] == pytest.approx([r["loss"] for r in expected[:-1]], abs=1e-6)


def test_bf16_follows_fp32(whole: tuple[Path, list[Any]]) -> None:
    folder, expected = whole
    results = run_world(1, _train, str(folder / "weights.safetensors"), None, 1, 1, 4, True, "bf16")[0]
    assert [r["loss"] for r in results[:-1]] == pytest.approx([r["loss"] for r in expected[:-1]], abs=2e-2)


def test_two_replicas_average_over_tokens(whole: tuple[Path, list[Any]]) -> None:
    """The step's loss is the token mean over both replicas, whose samples differ in length."""
    folder, _ = whole
    source = str(folder / "weights.safetensors")
    both = run_world(2, _train, source, None, 1, 1, 1, True, "fp32")
    assert both[0] == both[1]
    total, tokens = run_world(1, _mean_over, source)[0]
    assert both[0][0]["loss_tokens"] == tokens
    assert both[0][0]["loss"] == pytest.approx(total / tokens, abs=1e-6)


def _mean_over(weights: str) -> tuple[float, int]:
    """Loss sum and loss tokens of the first batch of replica 0 and of replica 1, computed without the engine's step."""
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights
    from tests.engine.tiny import CountingLoader, tiny_model

    init_model_parallel(seed=3)
    module = tiny_model()
    load_initial_weights(module, weights)
    total, tokens = 0.0, 0
    for rank in range(2):
        batch = next(iter(CountingLoader(rank, 2)))
        total += float(module(batch).sum())
        tokens += batch.num_loss_tokens
    return total, tokens


def _poisoned(where: str) -> None:
    import torch

    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from tests.engine.tiny import CountingLoader, tiny_model

    job = tiny_job(Path("unused"))
    init_model_parallel(seed=3)
    state = build_train_state(tiny_model(), job.optim, job.trainer, job.parallel, torch.device("cpu"))
    weight = state.module.output_layer.weight
    if where == "loss":
        weight.data.fill_(float("nan"))
    else:
        weight.register_hook(lambda grad: grad * float("inf"))
    batches = (
        iter(CountingLoader(0, 1)) if where != "data" else iter(list(itertools.islice(iter(CountingLoader(0, 1)), 1)))
    )
    train_step(state, batches, 2, 32, 17)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"FloatingPointError: loss=nan at step 17; samples 0/1, 1/1; lower optim.lr"),
        ("gradient", r"FloatingPointError: gradient norm=(nan|inf) \(loss=\d.*\) at step 17; samples 0/1, 1/1;"),
        ("data", r"ValueError: the training data ended"),
    ],
)
def test_broken_steps_say_what_broke(where: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_world(1, _poisoned, where)


def _nothing_trains() -> None:
    import torch

    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from tests.engine.tiny import tiny_model

    job = tiny_job(Path("unused"))
    init_model_parallel(seed=3)
    build_train_state(tiny_model().requires_grad_(False), job.optim, job.trainer, job.parallel, torch.device("cpu"))


def test_frozen_model_is_refused() -> None:
    with pytest.raises(AssertionError, match="no parameter is trainable"):
        run_world(1, _nothing_trains)
