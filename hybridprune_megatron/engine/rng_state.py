"""Every random generator of a process, as tensors and plain values, and back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def rng_state() -> dict[str, Any]:
    """Generators of python, numpy, torch and megatron's tracker."""
    version, numbers, gauss = random.getstate()
    # numpy's newest form is a dict of plain values and one array.
    generator: Any = np.random.get_state(legacy=False)
    generator["state"]["key"] = torch.from_numpy(generator["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": generator,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` returned. Do it last, right before the first step."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = {**state["numpy"], "state": {**state["numpy"]["state"]}}
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
