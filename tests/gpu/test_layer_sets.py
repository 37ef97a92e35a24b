"""Both layer sets compared on a GPU: `pytest -m gpu tests/gpu`, with the gpu extra and kernels/ installed."""

from __future__ import annotations

import pytest

from tests.gpu.layer_sets import CHECKS
from tests.programs import results_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("tests.gpu.layer_sets", tmp_path_factory.mktemp("layer_sets"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_layer_sets(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]
