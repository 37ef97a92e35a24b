"""Transformer Engine, mamba_ssm and causal-conv1d for a CPU: the real ones' signatures and demands, torch inside.

The path over these packages cannot run without a GPU. With ``install`` it can be executed and compared: constructors
and calls have the real ones' names, order and defaults, so an argument that does not exist fails; what the real kernels
check (dtypes, strides, shapes, mask types, rows in FP8) is asserted. They compute with the reference of ``ops/`` and
round nothing to FP8. Read in Transformer Engine 2.x, mamba_ssm 2.2 and causal-conv1d 1.5; one tensor-parallel rank.

``install`` must come before megatron is imported, which looks for Transformer Engine once.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hybridprune_megatron.ops.attention import packed_attention
from hybridprune_megatron.ops.conv import causal_conv
from hybridprune_megatron.ops.norm import gated_rms_norm, rms_norm
from hybridprune_megatron.ops.ssd import ssd_scan

#: What rows and columns in FP8 divide by, by the recipe's class.
_TILES = {"DelayedScaling": 16, "Float8CurrentScaling": 16, "MXFP8BlockScaling": 32, "Float8BlockScaling": 128}


@dataclass
class Product:
    """One matrix product of a linear.

    Attributes:
        module: the linear.
        recipe: class name of the recipe it ran in; None: no FP8.
        largest: of the input's absolute values, from which a scale would come.
        recomputing: in backward, under activation recomputation.
    """

    module: nn.Module
    recipe: str | None
    largest: float
    recomputing: bool


@dataclass
class State:
    """What Transformer Engine keeps in globals.

    Attributes:
        recipe: of the innermost ``fp8_autocast``; None: FP8 is off.
        depth: how many are open.
        closed: how often the outermost was closed, which is when delayed scaling updates.
        recomputing: inside of backward's pass of ``checkpoint``.
        products: all matrix products so far.
    """

    recipe: Any = None
    depth: int = 0
    closed: int = 0
    recomputing: bool = False
    products: list[Product] = field(default_factory=list)


STATE = State()


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


def _recipe(name: str, **fields: Any) -> type:
    """A recipe class; like the real ones (pydantic) it ignores what it does not know."""

    def init(self: Any, **kwargs: Any) -> None:
        assert isinstance(kwargs.get("fp8_format"), Format), kwargs
        for key, default in fields.items():
            setattr(self, key, kwargs.get(key, default))

    return type(name, (), {"__init__": init})


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before = STATE.recipe
    STATE.recipe, STATE.depth = fp8_recipe if enabled else None, STATE.depth + 1
    try:
        yield
    finally:
        STATE.recipe, STATE.depth = before, STATE.depth - 1
        STATE.closed += STATE.depth == 0


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    assert not enabled, "parameters stay in bf16"
    yield


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Recomputation; the second pass runs in the context that was open around the first."""
    assert set(kwargs) <= {"distribute_saved_activations", "get_rng_state_tracker", "tp_group", "use_reentrant"}, kwargs
    outer, passes = STATE.recipe, []

    def run(*inputs: Any) -> Any:
        passes.append(None)
        before = STATE.recipe, STATE.recomputing
        STATE.recipe, STATE.recomputing = outer, len(passes) > 1
        try:
            return function(*inputs)
        finally:
            STATE.recipe, STATE.recomputing = before

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)


class _Base(nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or isinstance(state, Tensor), type(state)


def _product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    # Megatron derives a class of its own from one of them.
    name = next((each.__name__ for each in type(STATE.recipe).__mro__ if each.__name__ in _TILES), None)
    if name is not None:
        # Megatron fills an expert's rows up to 16 under blockwise.
        grouped = isinstance(module, GroupedLinear) and name == "Float8BlockScaling"
        rows, tile = x.numel() // x.shape[-1], _TILES[name]
        assert rows % (16 if grouped else tile) == 0, f"{rows} rows in {name}"
        assert weight.shape[0] % tile == 0, (name, weight.shape)
        assert weight.shape[1] % tile == 0, (name, weight.shape)
        assert x.dtype == torch.bfloat16, x.dtype
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    STATE.products.append(Product(module, name, largest, STATE.recomputing))
    return nn.functional.linear(x, weight)


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "one rank"
        assert bias is return_bias is fuse_wgrad_accumulation is False
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.save_original_input, self.parallel_mode = save_original_input, parallel_mode
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if init_method is not None:
            init_method(self.weight)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Tensor:
        return _product(self, inp, self.weight)


class LayerNormLinear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "one rank"
        assert bias is return_bias is fuse_wgrad_accumulation is zero_centered_gamma is False
        assert (normalization, parallel_mode) == ("RMSNorm", "column")
        self.in_features, self.out_features, self.use_bias, self.eps = in_features, out_features, bias, eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if init_method is not None:
            init_method(self.weight)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Tensor:
        return _product(self, rms_norm(inp, self.layer_norm_weight, self.eps), self.weight)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "one rank"
        assert bias is return_bias is fuse_wgrad_accumulation is False
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.save_original_input = save_original_input
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            if init_method is not None:
                init_method(weight)
            self.register_parameter(f"weight{number}", weight)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert all(type(rows) is int for rows in m_splits)
        assert len(m_splits) == self.num_gemms
        parts = inp.split(m_splits)
        return torch.cat([_product(self, part, getattr(self, f"weight{n}")) for n, part in enumerate(parts)])


class RMSNorm(_Base):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DotProductAttention(_Base):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        assert cp_group is None, "Transformer Engine would cut every sample by itself"
        assert (attention_type, attention_dropout, window_size, softmax_scale) == ("self", 0.0, None, None)
        self.heads, self.groups, self.width = num_attention_heads, num_gqa_groups, kv_channels
        self.layer_number = layer_number

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        assert qkv_format == "thd", qkv_format
        assert attn_mask_type == "padding_causal", attn_mask_type
        assert attention_mask is None
        assert query_layer.dim() == key_layer.dim() == value_layer.dim() == 3
        assert query_layer.shape[1:] == (self.heads, self.width), query_layer.shape
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.groups, self.width), key_layer.shape
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        for starts, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_kv, max_seqlen_kv)):
            assert starts is not None
            assert (starts.dtype, starts.dim()) == (torch.int32, 1)
            # An int: the kernels' grid must not wait for the device.
            assert type(longest) is int
            assert longest == int(starts.diff().max())
        assert cu_seqlens_q_padded is cu_seqlens_kv_padded is None
        assert cu_seqlens_q is not None
        return packed_attention(query_layer, key_layer, value_layer, cu_seqlens_q.diff().tolist())


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> Any:
        raise AssertionError("an expert's rows would be filled up with zeros")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [batch, channels, L] -> the same."""
    batch, channels, length = x.shape
    assert x.stride(1) == 1, "seq_idx is only supported for channel last layout"
    assert x.stride(2) > 1, "seq_idx is only supported for channel last layout"
    assert channels % 8 == 0, channels
    assert x.stride(2) % 8 == x.stride(0) % 8 == 0, x.stride()
    assert weight.shape[0] == channels
    assert 2 <= weight.shape[1] <= 4
    assert bias is not None
    assert bias.shape == (channels,)
    assert bias.dtype == weight.dtype
    assert bias.stride(-1) == 1
    assert seq_idx is not None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (batch, length)
    assert batch == 1
    assert activation in ("silu", "swish")
    assert initial_states is None
    assert not return_final_states
    y = causal_conv(x[0].T, weight, bias, _lengths(seq_idx[0]))
    return nn.functional.silu(y).T.unsqueeze(0)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor:
    """x [batch, L, heads, width] -> the same."""
    batch, length, heads, _ = x.shape
    groups, state = B.shape[2:]
    assert heads % groups == 0
    assert B.shape == C.shape == (batch, length, groups, state)
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert A.dtype == torch.float32
    assert D is not None
    assert D.shape == (heads,)
    assert seq_idx is not None
    assert seq_idx.shape == (batch, length)
    assert x.dtype == B.dtype == C.dtype
    assert x.stride(-1) == 1
    assert z is dt_bias is initial_states is None
    # The mixer's dt is behind its bias and softplus; a second one would go unnoticed by shapes.
    assert not dt_softplus
    assert bool((dt >= 0).all())
    return ssd_scan(x[0], dt[0], A, B[0], C[0], D, seq_idx[0], chunk_size).unsqueeze(0)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """x [L, channels] -> the same."""
    assert z is not None
    assert z.shape == x.shape
    assert weight.shape == (x.shape[-1],)
    assert group_size is not None
    assert x.shape[-1] % group_size == 0
    assert bias is None
    assert not norm_before_gate, "the gate comes first in this family"
    assert eps == 1e-5
    return gated_rms_norm(x, z, weight, group_size)


def _lengths(seq_idx: Tensor) -> list[int]:
    return torch.unique_consecutive(seq_idx, return_counts=True)[1].tolist()


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


def install() -> None:
    """Puts the packages where ``import`` finds them."""

    class FP8GlobalStateManager:
        @staticmethod
        def is_fp8_enabled() -> bool:
            return STATE.recipe is not None

    class CudaRNGStatesTracker:
        pass

    fp8 = {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast}
    fp8["fp8_model_init"] = fp8_model_init
    names = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    recipes = {name: _recipe(name, fp8_format=None, amax_history_len=1024, amax_compute_algo="max") for name in names}
    linears = {"Linear": Linear, "LayerNormLinear": LayerNormLinear, "GroupedLinear": GroupedLinear}
    te = "transformer_engine"
    _module(te, __version__="2.9.0")
    _module(f"{te}.common")
    _module(f"{te}.common.recipe", Format=Format, **recipes)
    _module(
        f"{te}.pytorch",
        RMSNorm=RMSNorm,
        DotProductAttention=DotProductAttention,
        LayerNorm=nn.LayerNorm,
        Fp8Padding=Fp8Padding,
        Fp8Unpadding=Fp8Padding,
        **linears,
        **fp8,
    )
    _module(f"{te}.pytorch.fp8", **fp8)
    _module(f"{te}.pytorch.ops")
    _module(
        f"{te}.pytorch.distributed",
        CudaRNGStatesTracker=CudaRNGStatesTracker,
        checkpoint=checkpoint,
        activation_recompute_forward=None,
    )
    router = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    _module(f"{te}.pytorch.router", **dict.fromkeys(router))
    _module(f"{te}.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (Tensor,), {}))
    functions = ("replace_raw_data", "cast_master_weights_to_fp8", "post_all_gather_processing")
    _module(f"{te}.pytorch.tensor.utils", **dict.fromkeys(functions))
    _module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    _module("mamba_ssm")
    _module("mamba_ssm.ops")
    _module("mamba_ssm.ops.triton")
    _module("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    _module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
