"""Transformer Engine's modules, contexts and recipes; see the package."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hybridprune_megatron.ops.norm import rms_norm
from hybridprune_megatron.ops.packed_attention import packed_attention

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


RECIPES = {name: _recipe(name, fp8_format=None, amax_history_len=1024, amax_compute_algo="max") for name in _TILES}


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return STATE.recipe is not None


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
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "one rank"
        assert bias is return_bias is fuse_wgrad_accumulation is False
        assert single_grouped_weight is single_grouped_bias is False, "weights are stored one by one"
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
        device: Any = None,
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
