"""Runs megatron-core on a machine without CUDA, over gloo.

Why this exists: megatron-core 0.19 is written for GPUs. It asks ``torch.cuda`` for the current device, for
streams, events and generator states, writes ``device="cuda"`` into factory calls, and recognises parameter
dtypes by the name of their CUDA tensor type. None of its arithmetic needs a GPU. This module answers those
questions with the CPU, so that the real process groups, DDP, distributed optimizer, schedules and checkpoints
run (and are tested) anywhere. It changes no megatron algorithm.

It is the only place in the project that patches anything. :func:`activate` refuses to run where CUDA exists,
and is called by :func:`hybridprune_megatron.engine.ensure_device_backend` alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_active_mode: _CudaNamesMeanCpu | None = None


class _NullStream:
    """Stands for a CUDA stream or event: work on a CPU is done when the call returns, there is nothing to order."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: _NullStream | None = None) -> _NullStream:
        """Returns the event (or a new one), already complete."""
        return event or _NullStream()

    def record(self, stream: object = None) -> None:
        """Complete at once."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always complete."""
        return True

    def elapsed_time(self, end: object) -> float:
        """Milliseconds between two events; a CPU has no device clock, so 0."""
        return 0.0


def _is_cuda(device: object) -> bool:
    """Whether an argument names a CUDA device: "cuda", "cuda:0" or torch.device("cuda", 0)."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


#: Methods that are looked at whatever their keywords are.
_WITH_A_DEVICE = frozenset((torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type))


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Rewrites a CUDA device in any torch call to the CPU; answers ``Tensor.type()`` as the optimizers expect it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Thousands of calls a pass go by here, nearly all of them this way.
        if func not in _WITH_A_DEVICE and not (kwargs and "device" in kwargs):
            return func(*args, **kwargs) if kwargs else func(*args)
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs = {**kwargs, "device": _CPU}
        else:
            kwargs = {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            # Only megatron's optimizers are told "cuda": they sort parameters by this name.
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                return name.replace("torch.", "torch.cuda.", 1)
            return name
        return func(*args, **kwargs)


def _cpu_generator_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_cpu_generator_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.default_generator.set_state(new_state)


def _seed_cpu_generator(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(int(seed))


def _as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor that is on the CPU already; splits of an all-to-all are numpy arrays there."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _null_context() -> Callable[..., Any]:
    @contextlib.contextmanager
    def context(*_: Any, **__: Any) -> Iterator[None]:
        yield

    return context


def _returns(value: Any) -> Callable[..., Any]:
    """A new function each time: torch.compile's table of torch's functions refuses one object under two names."""

    def function(*_: Any, **__: Any) -> Any:
        return value

    return function


def _no_rng_warning(record: logging.LogRecord) -> bool:
    # On a CPU the tracker's generator *is* the CPU generator, so this warning would fire at every use.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _patch_torch_cuda() -> None:
    """Points the parts of torch.cuda that megatron uses at the CPU."""
    replacements: dict[str, Any] = {
        "current_device": _returns(_CPU),
        "current_stream": lambda *_: _NullStream(),
        "default_stream": lambda *_: _NullStream(),
        "Stream": _NullStream,
        "Event": _NullStream,
        "stream": _null_context(),
        "device": _null_context(),
        "get_rng_state": _cpu_generator_state,
        "set_rng_state": _set_cpu_generator_state,
        "manual_seed": _seed_cpu_generator,
        # torch.manual_seed has set the CPU generator already when it calls this.
        "manual_seed_all": _returns(None),
        "default_generators": (torch.default_generator,),
    }
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        replacements[name] = _returns(None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        replacements[name] = _returns(0)
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    # Annotated for mypy: these are modules, whose attributes it otherwise holds to be constant.
    random_module: Any = torch.cuda.random
    random_module.get_rng_state = _cpu_generator_state
    random_module.set_rng_state = _set_cpu_generator_state
    nvtx: Any = torch.cuda.nvtx
    for name in ("range_push", "range_pop", "mark"):
        setattr(nvtx, name, _returns(None))
    nvtx.range = _null_context()


def _stay_eager() -> None:
    """Without torch.compile, which on a CPU needs a C++ compiler and takes longer than megatron's uses save."""
    from megatron.core import jit

    jit.disable_jit_fuser()
    # For what was imported, and so decorated, before.
    torch.compiler.set_stance("force_eager")


def _patch_megatron() -> None:
    """Two functions of megatron that ask whether a tensor is on a GPU."""
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_cpu
    # The setter would queue its work for a CUDA context that never comes.

    megatron_random._set_cuda_rng_state = _set_cpu_generator_state
    megatron_random._get_cuda_rng_state = _cpu_generator_state
    logging.getLogger(megatron_random.__name__).addFilter(_no_rng_warning)


def activate() -> None:
    """Switches the adapter on for the rest of the process. Calling it again does nothing.

    Raises:
        RuntimeError: if CUDA is available: nothing may reroute a GPU's work to the CPU.
    """
    global _active_mode
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU adapter was asked for on a machine with a CUDA device; it needs torch.cuda.is_available() False "
            "(set CUDA_VISIBLE_DEVICES= to train on the CPU of this machine)"
        )
    if _active_mode is not None:
        return
    # Megatron first: its import loads torch._dynamo, which registers torch.cuda's functions and must see the
    # real ones.
    _patch_megatron()
    _stay_eager()
    _patch_torch_cuda()
    mode = _CudaNamesMeanCpu()
    mode.__enter__()
    _active_mode = mode


def is_active() -> bool:
    """Whether this process runs megatron on the CPU."""
    return _active_mode is not None
