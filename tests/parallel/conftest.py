"""Weights that the layouts of a file start from."""

from __future__ import annotations

import pytest

from tests.parallel.run import write_weights
from tests.worlds import run_world


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of the tiny model; tests of other models have a fixture of their own."""
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_world(1, write_weights, path, [])
    return path
