"""Two sets of layer specs behind the same module names and checkpoint keys.

``torch``: plain torch, anywhere. ``te``: Transformer Engine, mamba_ssm and causal-conv1d, on a GPU. Both put the
layer's norm into the linear that follows it, as megatron's own hybrid spec does, so a checkpoint of one loads into the
other and into stock.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from hybridprune_megatron.config.files import missing_gpu_packages
from hybridprune_megatron.config.tuning_schema import LoraConfig
from hybridprune_megatron.models.experts import backend_experts_spec, torch_experts_spec
from hybridprune_megatron.models.lora import adapted
from hybridprune_megatron.models.mamba_ops import KernelMambaOps, MambaOps, TorchMambaOps
from hybridprune_megatron.models.mixers import ReductionMambaMixer, scoring_attention
from hybridprune_megatron.models.stack import ReductionStack
from hybridprune_megatron.models.torch_layers import NormColumnParallelLinear, PackedAttention, RMSNorm


def resolve_spec(name: str) -> str:
    """ "auto" becomes "te" where a GPU and its packages are there, else "torch".

    Raises:
        ValueError: "te" is asked for and cannot be had.
    """
    missing = missing_gpu_packages()
    if name == "te" and (missing or not torch.cuda.is_available()):
        reason = f"{', '.join(missing)} not installed" if missing else "no CUDA device"
        raise ValueError(f"model.spec=te: {reason}; install the gpu extra on a GPU machine or set model.spec=torch")
    if name == "auto":
        return "torch" if missing or not torch.cuda.is_available() else "te"
    return name


def stack_spec(name: str, mamba: Mapping[str, Any], lora: LoraConfig | None = None, context: int = 1) -> ModuleSpec:
    """The spec of the decoder.

    Transformer Engine's attention cuts every sample for context parallelism where ours cuts the whole packed sequence
    (so that drops move few rows), so there attention is torch's in both sets; its kernels are flash attention's too.

    Args:
        name: "torch" or "te", from ``resolve_spec``.
        mamba: further arguments of ``ReductionMambaMixer``.
        lora: adapters on the linears that it names; None: none.
        context: ranks that share a packed sequence.
    """
    if name == "te":
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return _spec(
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
            TEDotProductAttention if context == 1 else PackedAttention,
            TENorm,
            KernelMambaOps(),
            backend_experts_spec(TENorm, TESpecProvider()),
            mamba,
            lora,
        )
    return _spec(
        NormColumnParallelLinear,
        RowParallelLinear,
        PackedAttention,
        RMSNorm,
        TorchMambaOps(),
        torch_experts_spec(RMSNorm),
        mamba,
        lora,
    )


def _spec(
    norm_linear: type[nn.Module],
    row_linear: type[nn.Module],
    core_attention: type[nn.Module],
    norm: type[nn.Module],
    mamba_ops: MambaOps,
    experts: ModuleSpec,
    mamba: Mapping[str, Any],
    lora: LoraConfig | None,
) -> ModuleSpec:
    def column(target: str) -> type[nn.Module]:
        return adapted(norm_linear, lora, 0) if lora is not None and target in lora.targets else norm_linear

    def row(target: str) -> type[nn.Module]:
        return adapted(row_linear, lora, 1) if lora is not None and target in lora.targets else row_linear

    mamba_layer = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=ReductionMambaMixer,
                params={"ops": mamba_ops, **mamba},
                submodules=MambaMixerSubmodules(in_proj=column("in_proj"), out_proj=row("out_proj")),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column("linear_qkv"),
                    core_attention=scoring_attention(core_attention),
                    linear_proj=row("linear_proj"),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    mlp_linears = MLPSubmodules(linear_fc1=column("linear_fc1"), linear_fc2=row("linear_fc2"))
    mlp = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp_linears), mlp_bda=get_bias_dropout_add
        ),
    )
    return ModuleSpec(
        module=ReductionStack,
        params={"final_norm": norm},
        submodules=HybridStackSubmodules(
            mamba_layer=mamba_layer, attention_layer=attention, mlp_layer=mlp, moe_layer=experts
        ),
    )
