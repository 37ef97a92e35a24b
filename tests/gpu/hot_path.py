"""A training pass does not wait for the device, and attention in bf16; run as a program by ``test_hot_path``.

python -m tests.gpu.hot_path FOLDER [CHECK ...]

Runs on a CPU too. There every call is looked at that would make the host wait if its tensors were on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridprune_megatron.method.layout import TokenLayout
from tests.models.tiny import tiny_batch, tiny_config
from tests.programs import run_checks

#: Calls whose result's size or value the host has to be told.
_WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive", "equal")
# Not a width of any kernel's tile; queries in groups.
_HEADS, _GROUPS, _WIDTH = 8, 2, 64


class WaitsForNothing(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU.

    Raises:
        AssertionError: by the call that would.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        masks = func.__name__ == "index.Tensor" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = func.__name__ == "repeat_interleave.Tensor" and not (kwargs or {}).get("output_size")
        assert name not in _WAITING, f"{func} waits for the device"
        assert not masks, f"{func} by a mask waits for the device"
        assert not unsized, f"{func} without output_size waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Where a call that waits for the device is an error: torch's own mode on a GPU, ``WaitsForNothing`` elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    # On a GPU these are found on the host and copied once.
    on_host: Any = TokenLayout.from_samples
    mode = WaitsForNothing()

    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return on_host(*args, **kwargs)

    TokenLayout.from_samples = outside  # type: ignore[method-assign]
    try:
        with mode:
            yield
    finally:
        TokenLayout.from_samples = on_host  # type: ignore[method-assign]


def own_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def a_forward_waits_for_nothing() -> None:
    """Under every score that ships, dropping in most layers; the second pass, for the first may compile or allocate."""
    from hybridprune_megatron.models.build import build_model

    for overrides in (["reduction=query"], ["reduction=query_softmax"], ["reduction=uniform"], ["reduction=none"]):
        cfg = tiny_config("trainer.precision=bf16", "model.spec=auto", *overrides)
        model = build_model(cfg).to(own_device()).train()
        batch = tiny_batch(17, 25, 9)
        if torch.cuda.is_available():
            batch = batch.to(own_device())
        model(batch).sum().backward()
        torch.cuda.synchronize()
        with waiting_refused():
            loss = model(batch)
        assert bool(loss.isfinite().all()), overrides


def attention_in_bf16() -> None:
    """l < L queries that end with the keys, in groups, against float64 of the same bf16 numbers; gradients too."""
    from hybridprune_megatron.ops.packed_attention import shared_attention

    generator = torch.Generator().manual_seed(1)
    starts, length = [0, 65, 66, 200], 200
    for parts in ([slice(0, length)], [slice(40, 130), slice(150, 200)]):
        rows = sum(part.stop - part.start for part in parts)
        shapes = ((rows, _HEADS, _WIDTH), (length, _GROUPS, _WIDTH), (length, _GROUPS, _WIDTH))
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        weight = torch.randn(rows, _HEADS * _WIDTH, generator=generator)
        found: dict[torch.dtype, list[torch.Tensor]] = {}
        for dtype, device in ((torch.bfloat16, own_device()), (torch.float64, torch.device("cpu"))):
            leaves = [value.detach().to(device, dtype, copy=True).requires_grad_() for value in values]
            out = shared_attention(*leaves, parts, starts)
            (out * weight.to(device, dtype)).sum().backward()
            found[dtype] = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        for one, exact in zip(found[torch.bfloat16], found[torch.float64], strict=True):
            error = float((one.cpu().double() - exact).norm() / exact.norm())
            # bf16 has 8 bits; sums are kept in more.
            assert error < 2**-7, (parts, error)


CHECKS: tuple[Callable[[], None], ...] = (attention_in_bf16, a_forward_waits_for_nothing)

if __name__ == "__main__":
    run_checks(CHECKS)
