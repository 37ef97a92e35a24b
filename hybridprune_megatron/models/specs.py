"""Two sets of layer specs with the same module names and checkpoint keys.

``torch``: plain torch, anywhere. ``te``: Transformer Engine, mamba_ssm and causal-conv1d, on a GPU. Both put the
layer's norm into the linear that follows it, as megatron's own hybrid spec does, so a checkpoint of one loads into the
other and into stock.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
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
from hybridprune_megatron.config.one_line import not_importable
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
        ValueError: "te" is asked for and not available, or its packages are there and cannot be imported.
    """
    missing = missing_gpu_packages()
    if name == "te" and (missing or not torch.cuda.is_available()):
        reason = f"{', '.join(missing)} not installed" if missing else "no CUDA device"
        raise ValueError(f"model.spec=te: {reason}; install the gpu extra on a GPU machine or set model.spec=torch")
    if name == "auto":
        name = "torch" if missing or not torch.cuda.is_available() else "te"
    if name == "te" and not HAVE_TE:
        # Megatron takes an ImportError for "not installed".
        try:
            importlib.import_module("transformer_engine.pytorch.fp8")
        except Exception as error:
            raise ValueError(f"model.spec=te: {not_importable('transformer_engine', error)}") from error
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

        parts = Parts(
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
            TEDotProductAttention if context == 1 else PackedAttention,
            TENorm,
            KernelMambaOps(),
            backend_experts_spec(TENorm, TESpecProvider()),
            mamba,
            lora,
        )
    else:
        experts = torch_experts_spec(RMSNorm)
        ops = TorchMambaOps()
        parts = Parts(NormColumnParallelLinear, RowParallelLinear, PackedAttention, RMSNorm, ops, experts, mamba, lora)
    layers = {place: build(parts) for place, build in LAYER_SPECS.values()}
    return ModuleSpec(
        module=ReductionStack, params={"final_norm": parts.norm}, submodules=HybridStackSubmodules(**layers)
    )


@dataclass(frozen=True)
class Parts:
    """What the layers of one set are made of.

    Attributes:
        norm_linear: norm and column-parallel linear in one.
        row_linear: row-parallel linear.
        core_attention: attention over q, k and v.
        norm: the final norm.
        mamba_ops: convolution, scan and gated norm.
        experts: a whole layer of experts.
        mamba: further arguments of ``ReductionMambaMixer``.
        lora: adapters on the linears that it names; None: none.
    """

    norm_linear: type[nn.Module]
    row_linear: type[nn.Module]
    core_attention: type[nn.Module]
    norm: type[nn.Module]
    mamba_ops: MambaOps
    experts: ModuleSpec
    mamba: Mapping[str, Any]
    lora: LoraConfig | None

    def column(self, target: str) -> type[nn.Module]:
        """The linear into a layer's inside."""
        lora = self.lora
        return adapted(self.norm_linear, lora, 0) if lora is not None and target in lora.targets else self.norm_linear

    def row(self, target: str) -> type[nn.Module]:
        """The linear out of it."""
        lora = self.lora
        return adapted(self.row_linear, lora, 1) if lora is not None and target in lora.targets else self.row_linear


def mamba_layer(parts: Parts) -> ModuleSpec:
    """A Mamba-2 layer."""
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=ReductionMambaMixer,
                params={"ops": parts.mamba_ops, **parts.mamba},
                submodules=MambaMixerSubmodules(in_proj=parts.column("in_proj"), out_proj=parts.row("out_proj")),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def attention_layer(parts: Parts) -> ModuleSpec:
    """An attention layer."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column("linear_qkv"),
                    core_attention=scoring_attention(parts.core_attention),
                    linear_proj=parts.row("linear_proj"),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def mlp_layer(parts: Parts) -> ModuleSpec:
    """An MLP layer."""
    linears = MLPSubmodules(linear_fc1=parts.column("linear_fc1"), linear_fc2=parts.row("linear_fc2"))
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(MLP.as_mlp_submodule, submodules=linears), mlp_bda=get_bias_dropout_add
        ),
    )


#: By kind of layer: its place in megatron's stack, and what builds it.
LAYER_SPECS: dict[str, tuple[str, Callable[[Parts], ModuleSpec]]] = {
    "mamba": ("mamba_layer", mamba_layer),
    "attention": ("attention_layer", attention_layer),
    "mlp": ("mlp_layer", mlp_layer),
    "experts": ("moe_layer", lambda parts: parts.experts),
}
