"""FP8 in the layers: megatron's settings for it, and the contexts that its own stack would open.

What runs in FP8 are the products of Transformer Engine's linears inside a layer. Embedding, output layer, vision tower,
projector, adapters, convolution, scan and attention's core are outside or plain torch, and stay in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from hybridprune_megatron.config.fp8_schema import TILE, Fp8Config

# Compute capability from which on a recipe has kernels; Transformer Engine looks closer (CUDA's version, for one).
_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def fp8_settings(fp8: Fp8Config, spec: str, has_experts: bool) -> dict[str, Any]:
    """The fields of megatron's configuration for FP8.

    Args:
        has_experts: whether the model has E layers.

    Raises:
        ValueError: the layers or the GPU have no FP8.
    """
    if fp8.recipe is None:
        return {}
    if spec != "te":
        raise ValueError(
            f"fp8.recipe={fp8.recipe}: needs Transformer Engine, and model.spec=auto found no GPU or a package "
            "missing; install the gpu extra on a GPU machine or set fp8=none"
        )
    found, needed = torch.cuda.get_device_capability(), _CAPABILITY[fp8.recipe]
    if found < needed:
        raise ValueError(
            f"fp8.recipe={fp8.recipe}: needs compute capability {needed[0]}.{needed[1]}, and this GPU has "
            f"{found[0]}.{found[1]}; set another fp8.recipe or fp8=none"
        )
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        # Weights are quantized anew in every pass: evaluation and a distillation's teacher run between the passes of a
        # step, with other weights than those that Transformer Engine would have kept from its first one.
        "disable_parameter_transpose_cache": True,
        # An expert's rows are filled up with tokens that it did not ask for, at weight 0, not with zeros.
        "moe_router_padding_for_quantization": has_experts,
    }


def row_tile(config: TransformerConfig) -> int:
    """What the rows of every matrix in FP8 divide by; 1 without FP8."""
    return TILE[config.fp8_recipe] if config.fp8 else 1


def pass_context(config: TransformerConfig) -> AbstractContextManager:
    """What a whole pass through the layers runs in.

    Delayed scaling updates every scale when the outermost context ends, so for it there is one context, and only here.
    """
    return get_fp8_context(config) if _delayed(config) else nullcontext()


def layer_context(config: TransformerConfig, layer_number: int) -> AbstractContextManager:
    """What one layer runs in: its own context, or none where it stays in bf16 or ``pass_context`` is there.

    Args:
        layer_number: 1-based, of the whole model.
    """
    if not config.fp8 or _delayed(config):
        return nullcontext()
    return get_fp8_context(config, layer_number - 1)


def recomputed(
    config: TransformerConfig, tp_group: ProcessGroup, run: Callable[[Tensor], Tensor], hidden_states: Tensor
) -> Tensor:
    """``run(hidden_states)``, computed again in backward; with FP8, the second time by the scales of the first."""
    if config.fp8:
        return te_checkpoint(run, False, tensor_parallel.random.get_cuda_rng_tracker, tp_group, hidden_states)
    return tensor_parallel.checkpoint(run, False, hidden_states)


def _delayed(config: TransformerConfig) -> bool:
    return bool(config.fp8) and config.fp8_recipe == Fp8Recipe.delayed
