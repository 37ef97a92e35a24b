"""The messages between stages that nccl gets, megatron's own, run over gloo: the same digits as with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.parallel.test_layouts import LAYOUTS, run
from tests.worlds import run_world


def _as_nccl(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls ``fn`` where the stages' communicator takes their backend for nccl."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from hybridprune_megatron.models import stage_cut

    theirs: Any = P2PCommunicator._communicate
    sent: list[None] = []

    def counted(*inputs: Any, **named: Any) -> Any:
        sent.append(None)
        return theirs(*inputs, **named)

    shim: Any = SimpleNamespace(**{**vars(dist), "get_backend": lambda *_: "nccl"})
    stage_cut.dist, P2PCommunicator._communicate = shim, counted
    result = fn(*args)
    # One process reads what the others have written.
    assert sent or dist.get_world_size() == 1, "megatron's messages were not sent"
    return result


@pytest.mark.parametrize("layout", ["PP2", "PP2 VP2"])
def test_messages_of_nccl_give_the_same_digits(tmp_path: Path, weights: str, layout: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    expected = run(tmp_path / "ours", weights, LAYOUTS[layout])
    found = run(tmp_path / "theirs", weights, LAYOUTS[layout], world=lambda n, fn, *a: run_world(n, _as_nccl, fn, *a))
    assert found[:2] == expected[:2]
    assert found[2].keys() == expected[2].keys()
    assert all((found[2][name] == gradient).all() for name, gradient in expected[2].items())
