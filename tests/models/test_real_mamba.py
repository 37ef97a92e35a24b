"""mamba_ssm's own kernels against ours, and the layers over them: forward and gradients, packed and reduced."""

from __future__ import annotations

import pytest

from tests.gpu_packages.real import mamba_folder
from tests.models.real_mamba import CHECKS
from tests.programs import results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    if mamba_folder() is None:
        pytest.skip("mamba-ssm's source package could not be fetched: make setup takes it from the package index")
    return results_of("tests.models.real_mamba", tmp_path_factory.mktemp("real_mamba"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_the_kernels_of_mamba_ssm(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]
