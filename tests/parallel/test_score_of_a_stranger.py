"""A score that this project does not know trains under every kind of parallelism as on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import stranger
from tests.parallel.run import write_weights
from tests.parallel.test_layouts import LAYOUTS, assert_same, run
from tests.worlds import run_world

LISTED = "reduction.schedule={name: listed, retention: [1.0,1.0,0.5,0.5,0.5,0.5,0.25,0.25]}"
MINE = ["reduction=mine", "reduction.budget=0.5625", LISTED, "reduction.select.multiple_of=8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    folder = tmp_path_factory.mktemp("stranger")
    stranger.write(folder)
    return lambda size, fn, *args: run_world(size, stranger.within, str(folder), fn, *args)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, world: Callable[..., list[Any]]) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    weights = str(folder / "model.safetensors")
    world(1, write_weights, weights, [])
    return weights, run(folder, weights, {}, MINE, world=world)


@pytest.mark.parametrize("layout", ["TP2+SP", "CP2", "PP2"])
def test_it_trains_split_as_whole(
    tmp_path: Path, world: Callable[..., list[Any]], alone: tuple[str, Any], layout: str
) -> None:
    weights, expected = alone
    kept = [len(expected[1]["42 frames", layer]) for layer in (0, 1, 2, 5, 6)]
    assert kept[0] == kept[1] > kept[2] == kept[3] > kept[4]
    assert_same(run(tmp_path, weights, LAYOUTS[layout], MINE, world=world), expected)
