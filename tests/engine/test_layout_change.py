"""A checkpoint of any parallel layout continues under any other, optimizer and place in the data included."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.job import run_job, tiny_job
from tests.worlds import run_world

#: tensor (with sequence parallel), pipeline, context, chunks a stage; data-parallel is what is left of two processes.
LAYOUTS = {
    "TP2+SP": (2, 1, 1, 1),
    "PP2": (1, 2, 1, 1),
    "PP2 VP2": (1, 2, 1, 2),
    "CP2": (1, 1, 2, 1),
    "DP2": (1, 1, 1, 1),
}
#: The same with the processes that share experts, of a model that has some.
EXPERT_LAYOUTS = {
    "DP2": (1, 1, 1, 1, 1),
    "DP2 EP2": (1, 1, 1, 1, 2),
    "TP2+SP EP2": (2, 1, 1, 1, 2),
}
_BEFORE, _AFTER = 2, 3
_MULTIPLE = 8

Sizes = tuple[int, ...]
Steps = list[tuple[float, float, str]]


@functools.cache
def _config(sizes: Sizes, processes: int) -> Any:
    from tests.models.tiny import tiny_config

    tensor, pipeline, context, chunks, *expert = sizes
    return tiny_config(
        *(["model=demo_experts", f"parallel.expert={expert[0]}"] if expert else []),
        *(f"parallel.tensor={tensor}", f"parallel.sequence_parallel={tensor > 1}", f"trainer.devices={processes}"),
        *(f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={chunks}", f"parallel.context={context}"),
        *(
            "reduction.schedule={name: listed, retention: [1.0,0.5,0.3,0.2]}",
            f"reduction.select.multiple_of={_MULTIPLE}",
        ),
        # A large epsilon: no update hangs on the sign of a gradient that is nearly zero.
        *("optim.lr=0.01", "optim.eps=1.0e-3", "optim.warmup_steps=2", "trainer.max_steps=8"),
        pattern="M*ME" if expert else {1: "M*M*", 2: "M*|M*", 4: "M|*|M|*"}[pipeline * chunks],
        budget=0.5,
    )


def _open(sizes: Sizes, weights: Path) -> tuple[Any, Any]:
    """The video model, reduced, and its loader in a layout; the weights are written if they are not there."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import data_rank, init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights, save_weights
    from hybridprune_megatron.models.build import build_model
    from tests.engine.tiny import ClipLoader

    parallel_state.destroy_model_parallel()
    tensor, pipeline, context, chunks, *expert = sizes
    shared = expert[0] if expert else 1
    init_model_parallel(tensor, pipeline, context, seed=3, virtual_pipeline=chunks, expert=shared)
    cfg = _config(sizes, dist.get_world_size())
    model = HybridPruneModule(cfg, functools.partial(build_model, cfg), lambda *_: None).build_stage()
    if weights.exists():
        load_initial_weights(model, weights)
    else:
        save_weights(model, weights)
    assert cfg.parallel.distributed_optimizer
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    where = data_rank()
    return state, ClipLoader(where.rank, where.size, pad_to_multiple_of=_MULTIPLE)


def _steps(state: Any, loader: Any, first: int, number: int) -> Steps:
    from hybridprune_megatron.engine.optimization import micro_batches_per_step
    from hybridprune_megatron.engine.train_step import train_step

    batches, count = iter(loader), micro_batches_per_step(2)
    results = [train_step(state, batches, count, 256, first + step) for step in range(number)]
    return [(result.loss, result.grad_norm, result.samples) for result in results]


#: Every pair of plain layouts, and interleaved chunks from and to two of them.
PAIRS = [
    *itertools.permutations([name for name in LAYOUTS if name != "PP2 VP2"], 2),
    *(("PP2 VP2", "TP2+SP"), ("TP2+SP", "PP2 VP2"), ("PP2 VP2", "PP2")),
]


def _undisturbed(folder: Path, sizes: Sizes = (1, 1, 1, 1)) -> Steps:
    return _steps(*_open(sizes, folder / "weights.safetensors"), 1, _BEFORE + _AFTER)


def _all_pairs(folder: Path, layouts: dict[str, Sizes], pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Steps]:
    from hybridprune_megatron.engine.checkpoint import CheckpointSaver, load_checkpoint

    saved = {}
    for name, sizes in layouts.items():
        state, loader = _open(sizes, folder / "weights.safetensors")
        _steps(state, loader, 1, _BEFORE)
        saved[name] = CheckpointSaver(folder / name).save(_BEFORE, state, loader.save_state(), {}, {})
    results = {}
    for source, target in pairs:
        path, sizes = saved[source], layouts[target]
        state, loader = _open(sizes, folder / "weights.safetensors")
        loaded = load_checkpoint(path, state, loader.save_state())
        # Random states belong to ranks, and chunks of layers change none.
        assert (loaded["rng"] is None) == (layouts[source][:3] != sizes[:3])
        loader.load_state(loaded["loader"])
        results[source, target] = _steps(state, loader, _BEFORE + 1, _AFTER)
    return results


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, dict[tuple[str, str], Steps]]:
    folder = tmp_path_factory.mktemp("layouts")
    whole = run_world(1, _undisturbed, folder)[0]
    one, other = run_world(2, _all_pairs, folder, LAYOUTS, PAIRS)
    assert one == other
    return whole, one


def test_experts_move_between_processes(tmp_path: Path) -> None:
    whole = run_world(1, _undisturbed, tmp_path, (1, 1, 1, 1, 1))[0]
    pairs = list(itertools.permutations(EXPERT_LAYOUTS, 2))
    for found in run_world(2, _all_pairs, tmp_path, EXPERT_LAYOUTS, pairs)[0].values():
        for step, expected in zip(found, whole[_BEFORE:], strict=True):
            assert step[:2] == pytest.approx(expected[:2], rel=1e-4)
            assert step[2] == expected[2]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_layouts_continue_each_other(
    pairs: tuple[Steps, dict[tuple[str, str], Steps]], source: str, target: str
) -> None:
    whole, results = pairs
    for found, expected in zip(results[source, target], whole[_BEFORE:], strict=True):
        assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
        assert found[2] == expected[2]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_world(1, run_job, tiny_job(tmp_path_factory.mktemp("whole")), 0.0)[0]


@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 1)), ((2, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))])
def test_killed_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int], whole_run: list[dict[str, Any]]
) -> None:
    """(processes, tensor size) before and after, through Lightning."""
    (first, first_tensor), (second, second_tensor) = before, after
    with pytest.raises(AssertionError, match="died without an error message"):
        run_world(first, run_job, tiny_job(tmp_path, first_tensor), 0.0, "step:5")
    rows = run_world(second, run_job, tiny_job(tmp_path, second_tensor), 0.0)[0]
    for found, expected in zip(rows, whole_run, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert [found[key] for key in ("step", "samples", "lr")] == [expected[key] for key in ("step", "samples", "lr")]
