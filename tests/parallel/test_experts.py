"""Mixtures of experts under every kind of layout: the same tokens, loss and gradients as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.run import write_weights
from tests.parallel.test_layouts import assert_same, run
from tests.worlds import run_world

LAYERS = "M*MEM*ME"
#: Latent experts in groups, and a shared one.
EXPERTS = "model=demo_experts"
LAYOUTS: dict[str, dict[str, int]] = {
    # Every rank has all experts.
    "TP2+SP": {"tensor": 2},
    # Ranks with other samples share the experts.
    "DP2 EP2": {"data": 2, "expert": 2},
    # Ranks with other parts of a sequence do.
    "TP2+SP EP2": {"tensor": 2, "expert": 2},
    "PP2 CP2 EP2": {"pipeline": 2, "context": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_world(1, write_weights, path, [EXPERTS], LAYERS)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Any:
    return run(tmp_path_factory.mktemp("alone"), weights, {}, [EXPERTS], layers=LAYERS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(tmp_path: Path, weights: str, alone: Any, layout: str):
    assert_same(run(tmp_path, weights, LAYOUTS[layout], [EXPERTS], layers=LAYERS), alone)
