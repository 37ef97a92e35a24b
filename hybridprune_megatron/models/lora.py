"""Low-rank adapters (LoRA, Hu et al. 2021): ``y = x W^T + (alpha / r) dropout(x) A^T B^T``, W frozen.

A is [r, in], B [out, r] and 0 at first. They are parameters ``lora_a`` and ``lora_b`` of the linear itself, so every
other name of a checkpoint is that of the model without adapters.

Split over tensor-parallel ranks like the linear: a column-parallel one splits B by rows (in Mamba's in_proj inside each
of z, x, B, C, dt, as its weight) and keeps A whole; a row-parallel one splits A by columns and keeps B whole. Only r
channels are exchanged, never the full width.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hybridprune_megatron.config.tuning_schema import LoraConfig

_A, _B = "lora_a", "lora_b"
# Parts of Mamba's in_proj, in the order of its rows.
_IN_PROJ_PARTS = ["z", "x", "B", "C", "dt"]


def is_adapter(name: str) -> bool:
    """Whether a parameter or a checkpoint's key is (a part of) an adapter."""
    return not {_A, _B}.isdisjoint(name.split("."))


def train_adapters_only(module: nn.Module) -> None:
    """Freezes everything but the adapters of a module."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def merge_adapters(module: nn.Module) -> None:
    """Adds every adapter of a module to its weight and removes it; on every rank of a split model."""
    for part in module.modules():
        if isinstance(part, Adapter) and part.lora_a is not None:
            part.merge()


class Adapter(nn.Module):
    """What all adapted linears share. Stands before a linear with a ``weight`` [out, in] among a class's bases.

    Attributes:
        lora_a: [r, in of this rank]; None once merged.
        lora_b: [out of this rank, r]; None once merged.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    weight: nn.Parameter

    def add_adapter(self, lora: LoraConfig, a: Tensor, b: Tensor) -> None:
        """Registers A and B.

        Args:
            lora: uses ``rank``, ``alpha``, ``dropout``.
            a: this rank's part of a matrix from ``initial_a``.
            b: zeros.
        """
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapter to the weight, in float32, and removes it."""
        assert self.lora_a is not None, "merged already"
        assert self.lora_b is not None, "merged already"
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        self.weight.copy_(self.weight.float() + update)
        self.lora_a = self.lora_b = None

    def dropped(self, x: Tensor, differs: bool) -> Tensor:
        """Dropout of the adapter's input.

        Args:
            x: input.
            differs: tensor-parallel ranks hold different parts of the input, and must not draw alike.
        """
        if not (self.training and self.dropout):
            return x
        with get_cuda_rng_tracker().fork() if differs else nullcontext():
            return nn.functional.dropout(x, self.dropout)


def initial_a(lora: LoraConfig, input_size: int, like: Tensor) -> Tensor:
    """[r, in] uniform in +-1/sqrt(in), drawn whole, so that every split of a model starts from the same A."""
    a = torch.empty(lora.rank, input_size, device=like.device)
    if not a.is_meta:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a.to(like.dtype)


class ParallelAdapter(Adapter):
    """An adapter on a tensor-parallel linear; ``adapted`` makes the classes.

    Args:
        args, kwargs: as for the linear.
    """

    lora: LoraConfig
    #: 0: the linear splits its output (column-parallel); 1: its input (row-parallel).
    split_dim: int
    config: TransformerConfig

    def __init__(self, input_size: int, output_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, *args, **kwargs)
        group = kwargs.get("tp_group") or parallel_state.get_tensor_model_parallel_group()
        self.adapter_group = group
        self.splits_sequence = self.config.sequence_parallel and group.size() > 1
        a = initial_a(self.lora, input_size, self.weight)
        if self.split_dim == 1:
            a = a.chunk(group.size(), 1)[group.rank()].contiguous()
        self.add_adapter(self.lora, a, self.weight.new_zeros(self.weight.shape[0], self.lora.rank))
        split, whole, dim = (_B, _A, 0) if self.split_dim == 0 else (_A, _B, 1)
        set_tensor_model_parallel_attributes(getattr(self, split), True, dim, 1)
        set_tensor_model_parallel_attributes(getattr(self, whole), False, -1, 1)
        # Every rank has seen its own share of the sequence only: megatron sums such gradients over ranks.
        getattr(self, whole).sequence_parallel = self.splits_sequence

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The linear's output plus the adapter's, and the linear's bias if it leaves that to the caller."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.lora_a is None:
            return output, bias
        assert self.lora_b is not None, "half an adapter"
        norm = getattr(self, "layer_norm_weight", None)
        if norm is not None:
            # The linear normalises its input inside; the adapter has to see the same.
            input_ = nn.functional.rms_norm(input_, norm.shape, norm, self.config.layernorm_epsilon)
        differs = self.split_dim == 1 or self.splits_sequence
        low = nn.functional.linear(self.dropped(input_, differs), self.lora_a)
        return output + self.scale * nn.functional.linear(self._exchanged(low), self.lora_b), bias

    def _exchanged(self, low: Tensor) -> Tensor:
        """[., 1, r] after A to what B needs: the same communication as the linear's, on r channels."""
        group = self.adapter_group
        if self.split_dim == 0:
            if self.splits_sequence:
                return gather_from_sequence_parallel_region(low, group=group)
            return copy_to_tensor_model_parallel_region(low, group=group)
        if self.splits_sequence:
            return reduce_scatter_to_sequence_parallel_region(low, group=group)
        return reduce_from_tensor_model_parallel_region(low, group=group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The linear's, and A and B split as the weight is."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.lora_a is None:
            return state
        adapter = make_sharded_tensors_for_checkpoint(
            {_A: self.lora_a, _B: self.lora_b},
            prefix,
            {_B: 0} if self.split_dim == 0 else {_A: 1},
            sharded_offsets,
            tp_group=self.adapter_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        parts = getattr(self.weight, "partition_sizes", None)
        if parts is not None:
            adapter[prefix + _B] = _split_tensor_factory(adapter[prefix + _B], parts, _IN_PROJ_PARTS, 0)
        return state | adapter


def adapted(linear: type[nn.Module], lora: LoraConfig, split_dim: int) -> type[nn.Module]:
    """A tensor-parallel linear of megatron or Transformer Engine with an adapter.

    Args:
        linear: with the constructor ``(input_size, output_size, *, config, tp_group, ...)``.
        lora: of the adapter.
        split_dim: 0: column-parallel; 1: row-parallel.
    """
    return type(f"Adapted{linear.__name__}", (ParallelAdapter, linear), {"split_dim": split_dim, "lora": lora})


class AdaptedDense(Adapter, nn.Linear):  # type: ignore[misc]
    """An adapter on a plain linear that every tensor-parallel rank holds whole.

    Args:
        linear: without bias; its weight is taken over.
        lora: of the adapter.
    """

    def __init__(self, linear: nn.Linear, lora: LoraConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight  # type: ignore[assignment]
        a = initial_a(lora, linear.in_features, self.weight)
        self.add_adapter(lora, a, self.weight.new_zeros(linear.out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output plus the adapter's."""
        output = super().forward(x)
        if self.lora_a is None:
            return output
        assert self.lora_b is not None, "half an adapter"
        low = nn.functional.linear(self.dropped(x, differs=False), self.lora_a)
        return output + self.scale * nn.functional.linear(low, self.lora_b)


def adapt_projector(projector: nn.Sequential, lora: LoraConfig) -> None:
    """Puts an adapter on every linear of the projector."""
    for index, layer in enumerate(projector):
        if isinstance(layer, nn.Linear):
            projector[index] = AdaptedDense(layer, lora)
