"""No wait for the device in a training pass, and attention in bf16: on the CPU as far as it can tell, and on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.hot_path import CHECKS, waiting_refused
from tests.programs import results_of


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            patch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
        return results_of("tests.gpu.hot_path", tmp_path_factory.mktemp("hot_path"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_the_hot_path(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 1],
        lambda x: torch.nonzero(x),
        lambda x: torch.bincount(x),
        lambda x: x.repeat_interleave(x),
    ],
    ids=["item", "mask", "nonzero", "bincount", "repeat_interleave"],
)
def test_a_call_that_would_wait_is_refused(call, tmp_path: Path) -> None:
    x = torch.tensor([1, 2, 3])
    with pytest.raises(AssertionError, match="waits for the device"), waiting_refused():
        call(x)
