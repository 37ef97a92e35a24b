"""Transformer Engine, mamba_ssm and causal-conv1d for a CPU: the real ones' signatures and demands, torch inside.

The path over these packages cannot run without a GPU. With ``install`` it can be executed and compared: constructors
and calls have the real ones' names, order and defaults, so an argument that does not exist fails; what the real kernels
check (dtypes, strides, shapes, mask types, rows in FP8) is asserted. They compute with the reference of ``ops/`` and
round nothing to FP8. One tensor-parallel rank. Where `make setup` has laid the sources of the real packages, every call
is held to the real signature too (``signatures``).

``install`` must come before megatron is imported, which looks for Transformer Engine once.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tests.gpu_packages import engine, kernels
from tests.gpu_packages.engine import STATE, Product
from tests.gpu_packages.signatures import REAL, held_to, real_signature, recipe_signature

__all__ = ["STATE", "Product", "install"]


def _module(name: str, **members: Any) -> None:
    module = ModuleType(name)
    # A package, and one that importlib finds.
    module.__spec__, module.__path__ = ModuleSpec(name, None), []  # type: ignore[attr-defined]
    for key, value in members.items():
        setattr(module, key, value)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    sys.modules[name] = module


#: Of which the stand-ins are; megatron asks for it before it gives this or that argument.
ENGINE_VERSION = "2.20.2"


def stand_in(name: str) -> tuple[Any, str]:
    """What has a function of ``signatures.REAL``, and its name there."""
    owner, _, member = name.partition(".")
    module = engine if hasattr(engine, owner) else kernels
    return (getattr(module, owner), member) if member else (module, owner)


def hold_to_signatures() -> None:
    """From now on a call of a stand-in that the original would refuse is a TypeError, where its source is there."""
    for name in REAL:
        real = real_signature(name)
        if real is not None:
            owner, member = stand_in(name)
            setattr(owner, member, held_to(getattr(owner, member), real, name))
    for name, recipe in engine.RECIPES.items():
        real = recipe_signature(name)
        if real is not None:
            recipe.__init__ = held_to(recipe.__init__, real, name)  # type: ignore[misc]


def install() -> None:
    """Puts the packages where ``import`` finds them."""
    hold_to_signatures()
    fp8 = {name: getattr(engine, name) for name in ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")}
    modules = ("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "DotProductAttention", "Fp8Padding")
    te = "transformer_engine"
    _module(te, __version__=ENGINE_VERSION)
    _module(f"{te}.common")
    _module(f"{te}.common.recipe", Format=engine.Format, **engine.RECIPES)
    _module(
        f"{te}.pytorch",
        LayerNorm=nn.LayerNorm,
        Fp8Unpadding=engine.Fp8Padding,
        **{name: getattr(engine, name) for name in modules},
        **fp8,
    )
    _module(f"{te}.pytorch.fp8", **fp8)
    _module(f"{te}.pytorch.ops")
    # Megatron imports these and calls none of them here.
    tracker = type("CudaRNGStatesTracker", (), {})
    distributed = {"CudaRNGStatesTracker": tracker, "activation_recompute_forward": None}
    _module(f"{te}.pytorch.distributed", checkpoint=engine.checkpoint, **distributed)
    router = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    _module(f"{te}.pytorch.router", **dict.fromkeys(router))
    _module(f"{te}.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (Tensor,), {}))
    functions = ("replace_raw_data", "cast_master_weights_to_fp8", "post_all_gather_processing")
    _module(f"{te}.pytorch.tensor.utils", **dict.fromkeys(functions))
    _module("causal_conv1d", causal_conv1d_fn=kernels.causal_conv1d_fn)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        _module(name)
    _module("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=kernels.rmsnorm_fn)
    _module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=kernels.mamba_chunk_scan_combined)
