"""Plain-torch stand-ins for Transformer Engine's layers: same constructors, parameter names and checkpoint keys."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hybridprune_megatron.models.packed import LayerPacking
from hybridprune_megatron.ops.norm import rms_norm
from hybridprune_megatron.ops.packed_attention import packed_attention, shared_attention


class RMSNorm(nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism, which megatron's torch norm refuses.

    Args:
        config: says whether the sequence is sharded over tensor-parallel ranks.
        hidden_size: width.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and column-parallel linear in one module, the norm's weight under ``layer_norm_weight``."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        weight = torch.ones(input_size, dtype=config.params_dtype, device=parameter_device(config))
        self.layer_norm_weight = nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.norm_epsilon = config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm(input_, self.layer_norm_weight, self.norm_epsilon)
        return super().forward(normed, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Weight and bias sharded over rows, the norm's weight replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class PackedAttention(nn.Module):
    """Causal attention of a packed sequence with torch's scaled_dot_product_attention, one sample at a time.

    Takes megatron's core-attention arguments. Head h reads key-value head h * K // H.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        packed_seq_params: LayerPacking,
        **_: Any,
    ) -> Tensor:
        """Attends within samples.

        Args:
            query: [L, H, E], of this context-parallel rank's tokens; key and value likewise.
            key: [L, K, E].
            value: [L, K, E].
            attention_mask: unused; the packing says who sees whom.
            packed_seq_params: the packing of this layer.

        Returns:
            [L, H * E].
        """
        layout, shard = packed_seq_params.layout, packed_seq_params.shard
        if shard is None or shard.size == 1:
            return packed_attention(query, key, value, layout.sample_lengths)
        # Key-value heads are few: gathering them is cheaper than passing them round, and their layout stays free.
        key, value = shard.joined(torch.cat([key, value], -1)).chunk(2, -1)
        return shared_attention(query, key, value, shard.parts(layout.num_tokens), layout.sample_starts())


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 in fewer passes than megatron's, which raises to a power."""
    positive = torch.relu(x)
    return positive * positive if torch.is_grad_enabled() else positive.mul_(positive)


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where megatron's layers of this configuration put their parameters."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
