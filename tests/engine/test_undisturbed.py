"""What validating leaves as it was, also where the model or the samples draw random numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybridprune_megatron.engine.validation import _undisturbed


def _drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_generators_are_what_they_were(mode: bool, fails: bool) -> None:
    chunk: Any = torch.nn.Dropout(0.5).train(mode)
    chunk.use_forward_hook = False
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = _drawn()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    try:
        with _undisturbed(SimpleNamespace(ddp=[chunk])):  # type: ignore[arg-type]
            assert not chunk.training
            assert _drawn() == expected
            if fails:
                raise RuntimeError("a sample that cannot be read")
    except RuntimeError:
        assert fails
    assert chunk.training is mode
    assert _drawn() == expected
