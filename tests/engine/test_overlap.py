"""Communication beside computation: the switches reach megatron, and change when things are sent, not what."""

from __future__ import annotations

import pytest

from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world

_BOTH = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
_CASES = {"gradients": _BOTH[:1], "gradients and parameters": _BOTH}


def _trained(overrides: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Losses of three steps of two micro batches on two replicas, and sums of the weights afterwards."""
    import torch
    from megatron.core import parallel_state

    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.models.build import build_model

    settings = ("trainer.devices=2", "trainer.global_batch_size=4", "trainer.max_steps=8", "optim.warmup_steps=0")
    cfg = tiny_config(*settings, *overrides)
    init_model_parallel(seed=1)
    state = build_train_state(build_model(cfg), cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    ddp = state.ddp[0].ddp_config
    assert ddp.overlap_grad_reduce == cfg.parallel.overlap_grad_reduce
    assert ddp.overlap_param_gather == cfg.parallel.overlap_param_gather
    assert (getattr(state.ddp[0].config, "no_sync_func", None) is not None) == cfg.parallel.overlap_grad_reduce
    rank = parallel_state.get_data_parallel_rank()
    losses = []
    for step in range(1, 4):
        batches = [tiny_batch(3 + rank, 5 + micro, step) for micro in range(2)]
        losses.append(train_step(state, iter(batches), 2, 128, step).loss)
    # Parameters of the last update are gathered when the next pass wants them.
    state.ddp[0].start_param_sync(force_sync=True)
    return losses, [float(p.detach().double().sum()) for p in state.module.parameters()]


@pytest.mark.parametrize("case", _CASES)
def test_overlap_changes_no_digit(case: str) -> None:
    plain, overlapped = run_world(2, _trained, ()), run_world(2, _trained, _CASES[case])
    assert plain[0][1] == plain[1][1]
    assert overlapped == plain
