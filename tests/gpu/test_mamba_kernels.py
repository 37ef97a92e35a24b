"""The Mamba kernels that a GPU runs against ours: `pytest -m gpu tests/gpu`, with the gpu extra installed."""

from __future__ import annotations

import pytest

from tests.gpu.mamba_kernels import CHECKS
from tests.programs import results_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("tests.gpu.mamba_kernels", tmp_path_factory.mktemp("mamba_kernels"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_the_kernels_of_the_gpu_packages(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]
