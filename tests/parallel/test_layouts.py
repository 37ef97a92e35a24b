"""Every layout drops what one process drops, and gives its loss and every one of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridprune_megatron.method.schedule import cut_pattern, even_edges
from tests.parallel.run import PATTERN, SHARING, read, step, write_weights
from tests.worlds import run_world

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2+SP": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "TP2 DP2": {"tensor": 2, "data": 2},
    "PP2 CP2": {"pipeline": 2, "context": 2},
    "PP2 DP2": {"pipeline": 2, "data": 2},
    "CP2 DP2": {"context": 2, "data": 2},
    "CP4": {"context": 4},
    # Interleaved: each stage holds two chunks of layers.
    "PP2 VP2": {"pipeline": 2, "virtual_pipeline": 2},
}


def run(
    folder: Path,
    weights: str,
    sizes: dict[str, int],
    overrides: list[str] | None = None,
    local_chunks: int = 0,
    layers: str = PATTERN,
    world: Callable[..., list[Any]] = run_world,
) -> Any:
    """Loss, tokens that enter each layer by sequence and layer, and gradients."""
    processes = math.prod(size for name, size in sizes.items() if name not in SHARING)
    stages = sizes.get("pipeline", 1) * sizes.get("virtual_pipeline", 1)
    pattern = cut_pattern(layers, even_edges(len(layers), stages))
    gradients = folder / "gradients"
    ranks = world(processes, step, weights, str(gradients), sizes, overrides or [], pattern, local_chunks)
    losses = {loss for loss, _ in ranks}
    assert len(losses) == 1, "ranks report different losses"
    kept: dict[tuple[str, int], list[int]] = {}
    for _, seen in ranks:
        for name, layer, origin in seen:
            # Every rank that runs a layer on a sequence has the same plan.
            assert kept.setdefault((name, layer), origin) == origin
    return losses.pop(), kept, world(1, read, str(gradients), overrides or [], layers)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Any:
    return run(tmp_path_factory.mktemp("alone"), weights, {})


def assert_same(found: Any, expected: Any) -> None:
    """Same tokens in every layer, loss within 1e-5 relative, every gradient within 1e-4 relative."""
    assert found[1] == expected[1]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        error = np.linalg.norm(found[2][name] - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient), (name, error, np.linalg.norm(gradient))


def test_the_reference_drops_in_every_kind_of_layer(alone: Any):
    loss, kept, gradients = alone
    assert 3 < loss < 6
    lengths = [len(kept["42 frames", layer]) for layer in range(len(PATTERN))]
    assert [a > b for a, b in pairwise(lengths)] == [True, True, True, False, True, True, False], lengths
    assert sum(np.abs(gradient).sum() > 0 for gradient in gradients.values()) > 20


LOCAL = ["reduction.select.local_choice=true"]


@pytest.fixture(scope="module")
def alone_with_chunks(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Any:
    """One process that chooses in each of four chunks, as ranks of two chunks do."""
    return run(tmp_path_factory.mktemp("chunks"), weights, {}, LOCAL, local_chunks=4)


@pytest.mark.parametrize("layout", ["CP2", "TP2 CP2", "PP2 CP2"])
def test_a_local_choice_moves_no_row_and_equals_one_process_with_its_chunks(
    tmp_path: Path, weights: str, alone: Any, alone_with_chunks: Any, layout: str
):
    assert alone_with_chunks[1] != alone[1]
    assert_same(run(tmp_path, weights, LAYOUTS[layout], LOCAL), alone_with_chunks)


TIED = ["model.tie_embeddings=true"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Weights whose embedding is the head too, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("tied")
    path = str(folder / "tied.safetensors")
    run_world(1, write_weights, path, TIED)
    return path, run(folder, path, {}, TIED)


@pytest.mark.parametrize("layout", ["PP2", "PP2 VP2"])
def test_an_embedding_that_is_the_head_too_gets_the_gradients_of_both_ends(
    tmp_path: Path, tied: tuple[str, Any], layout: str
):
    path, expected = tied
    assert_same(run(tmp_path, path, LAYOUTS[layout], TIED), expected)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", ["one process", "CP2"])
def test_recomputed_activations_give_the_same_gradients(
    tmp_path: Path, weights: str, alone: Any, layout: str, recompute: str
):
    """And the plan is made once: what enters each layer is recorded in the first pass only."""
    found = run(tmp_path, weights, LAYOUTS.get(layout, {}), [f"trainer.recompute={recompute}"])
    assert_same(found, alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(tmp_path: Path, weights: str, alone: Any, layout: str):
    assert_same(run(tmp_path, weights, LAYOUTS[layout]), alone)


TOWER = ["model.trainable.vision=true"]


def test_a_tower_that_learns_gets_the_gradients_of_all_frames(tmp_path: Path, weights: str):
    """Frames are dealt out to tensor and to context ranks."""
    found = []
    for name, sizes in (("one", {}), ("four", LAYOUTS["TP2 CP2"])):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, weights, sizes, TOWER))
        gradients = found[-1][2]
        # Attention does not see what is added to all keys: this gradient is 0, and here what rounding leaves.
        assert np.abs(gradients.pop("vision_model.encoder.layer.0.attention.k_proj.bias")).max() < 1e-9
        assert sum(name.startswith("vision_model") for name, each in gradients.items() if np.abs(each).max() > 0) > 10
    assert_same(found[1], found[0])
