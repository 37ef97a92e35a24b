"""The parallel suite over nccl, a GPU a rank: `pytest -m nccl` on a machine with 2 to 8 of them.

What a layout finds is compared with one process on one GPU. A layout of more ranks than there are GPUs is skipped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridprune_megatron.method.schedule import cut_pattern, even_edges
from tests.parallel import test_experts, test_layouts, test_validation
from tests.parallel.run import PATTERN, SHARING, write_weights
from tests.parallel.test_layouts import LOCAL, TIED, assert_same, run
from tests.parallel.test_pooled_scores import _pooled, check_pooled
from tests.parallel.validate import figures, likeliest
from tests.worlds import run_gpu_world

pytestmark = [pytest.mark.gpu, pytest.mark.nccl, pytest.mark.timeout(1800)]


def processes(sizes: dict[str, int]) -> int:
    """Ranks of a layout."""
    return math.prod(size for name, size in sizes.items() if name not in SHARING)


def need(gpus: int) -> None:
    """Skips the test where there are fewer GPUs."""
    there = torch.cuda.device_count()
    if there < gpus:
        pytest.skip(f"nccl: needs {gpus} GPUs, this machine shows {there}")


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> None:
    need(2)


def start(tmp_path_factory: pytest.TempPathFactory, overrides: list[str], layers: str = PATTERN) -> str:
    """A file of random weights."""
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_gpu_world(1, write_weights, path, overrides, layers)
    return path


@pytest.fixture(scope="module")
def weights(two_gpus: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory, [])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Any:
    return run(tmp_path_factory.mktemp("alone"), weights, {}, world=run_gpu_world)


@pytest.mark.parametrize("layout", test_layouts.LAYOUTS)
def test_a_layout_equals_one_gpu(tmp_path: Path, weights: str, alone: Any, layout: str) -> None:
    sizes = test_layouts.LAYOUTS[layout]
    need(processes(sizes))
    assert_same(run(tmp_path, weights, sizes, world=run_gpu_world), alone)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(
    tmp_path: Path, weights: str, alone: Any, recompute: str
) -> None:
    found = run(tmp_path, weights, {"context": 2}, [f"trainer.recompute={recompute}"], world=run_gpu_world)
    assert_same(found, alone)


def test_a_local_choice_equals_one_gpu_with_its_chunks(tmp_path: Path, weights: str) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "split").mkdir()
    expected = run(tmp_path / "alone", weights, {}, LOCAL, local_chunks=4, world=run_gpu_world)
    assert_same(run(tmp_path / "split", weights, {"context": 2}, LOCAL, world=run_gpu_world), expected)


@pytest.mark.parametrize("layout", ["PP2", "PP2 VP2"])
def test_tied_embeddings_get_the_gradients_of_both_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    path = start(tmp_path_factory, TIED)
    expected = run(tmp_path_factory.mktemp("tied"), path, {}, TIED, world=run_gpu_world)
    assert_same(run(tmp_path, path, test_layouts.LAYOUTS[layout], TIED, world=run_gpu_world), expected)


@pytest.fixture(scope="module")
def experts(two_gpus: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Weights of a mixture of experts, and what one GPU makes of them."""
    options, layers = [test_experts.EXPERTS], test_experts.LAYERS
    path = start(tmp_path_factory, options, layers)
    return path, run(tmp_path_factory.mktemp("alone"), path, {}, options, layers=layers, world=run_gpu_world)


@pytest.mark.parametrize("layout", test_experts.LAYOUTS)
def test_experts_under_a_layout_equal_one_gpu(tmp_path: Path, experts: tuple[str, Any], layout: str) -> None:
    sizes = test_experts.LAYOUTS[layout]
    need(processes(sizes))
    path, expected = experts
    options, layers = [test_experts.EXPERTS], test_experts.LAYERS
    assert_same(run(tmp_path, path, sizes, options, layers=layers, world=run_gpu_world), expected)


@pytest.fixture(scope="module")
def validated(weights: str) -> tuple[dict[int, list[int]], dict[str, float]]:
    """Answers of the model, and what one GPU finds in a validation on them."""
    answers = run_gpu_world(1, likeliest, weights, [])[0]
    return answers, run_gpu_world(1, figures, weights, {}, [], answers)[0]


@pytest.mark.parametrize("layout", test_validation.LAYOUTS)
def test_a_validation_finds_what_one_gpu_finds(weights: str, validated: Any, layout: str) -> None:
    sizes = test_validation.LAYOUTS[layout]
    need(processes(sizes))
    answers, expected = validated
    stages = sizes.get("pipeline", 1) * sizes.get("virtual_pipeline", 1)
    pattern = cut_pattern(PATTERN, even_edges(len(PATTERN), stages))
    ranks = run_gpu_world(processes(sizes), figures, weights, sizes, [], answers, pattern)
    assert all(found == ranks[0] for found in ranks)
    test_validation.assert_same(ranks[0], expected)


def test_equal_tokens_keep_equal_scores() -> None:
    check_pooled(run_gpu_world(min(8, torch.cuda.device_count()), _pooled))
