"""E layers: megatron's mixture of experts, its latent projections without Transformer Engine too."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from hybridprune_megatron.config.schema import ExpertsConfig
from hybridprune_megatron.models.torch_layers import parameter_device


def torch_experts_spec(norm: type[nn.Module]) -> ModuleSpec:
    """An E layer in plain torch: one expert after the other.

    Args:
        norm: before the router.
    """
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        experts=partial(SequentialMLP, submodules=linears), shared_experts=partial(SharedExpertMLP, submodules=linears)
    )
    return _layer(norm, partial(TorchMoELayer, submodules=submodules))


def backend_experts_spec(norm: type[nn.Module], backend: BackendSpecProvider) -> ModuleSpec:
    """An E layer of a backend's modules, all experts in one grouped product.

    Args:
        norm: before the router.
    """
    return _layer(norm, get_moe_module_spec_for_backend(backend, num_experts=1, moe_grouped_gemm=True))


def _layer(norm: type[nn.Module], mixture: Any) -> ModuleSpec:
    submodules = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mixture, mlp_bda=get_bias_dropout_add)
    return ModuleSpec(module=MoETransformerLayer, submodules=submodules)


def expert_settings(experts: ExpertsConfig | None, parallel: int) -> dict[str, Any]:
    """The fields of megatron's configuration for E layers.

    Experts are whole on their ranks: expert parallelism divides them, tensor parallelism does not.

    Args:
        experts: sizes; None: no E layers.
        parallel: ranks that share the experts.
    """
    if experts is None:
        return {}
    grouped = experts.num_groups > 1
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_latent_size": experts.latent_size,
        "moe_router_topk_scaling_factor": experts.routed_scaling,
        "moe_router_num_groups": experts.num_groups if grouped else None,
        "moe_router_group_topk": experts.groups_per_token if grouped else None,
        "moe_router_bias_update_rate": experts.bias_update_rate,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        # The correction bias balances loads, if anything does.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel,
        "expert_tensor_parallel_size": 1,
    }


def prepare_experts(module: nn.Module, update_bias: bool) -> None:
    """Sets what megatron's constructors leave to others.

    Args:
        module: a built model.
        update_bias: whether correction biases move; else they stay as they are loaded.
    """
    for part in module.modules():
        if isinstance(part, TopKRouter):
            part.frozen_expert_bias = not update_bias
        elif isinstance(part, MoELayer):
            for parameter in part.experts.parameters():
                # Of the experts' own replicas and optimizer whatever the layout, so that checkpoints fit all of them.
                parameter.allreduce = False


class TorchMoELayer(MoELayer):
    """Megatron's layer, which builds its latent projections of Transformer Engine only.

    Args:
        submodules: router and experts.
        kwargs: as for ``MoELayer``.
    """

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules, **kwargs: Any) -> None:
        latent = config.moe_latent_size
        if not latent:
            super().__init__(config, submodules, **kwargs)
            return
        without = copy(config)
        without.moe_latent_size = None

        def experts(count: int, _: TransformerConfig, **arguments: Any) -> nn.Module:
            return submodules.experts(count, config, **arguments)

        super().__init__(without, MoESubmodules(experts, submodules.shared_experts, submodules.router), **kwargs)
        self.config = config
        self.fc1_latent_proj = ReplicatedLinear(config.hidden_size, latent, config)
        self.fc2_latent_proj = ReplicatedLinear(latent, config.hidden_size, config)


class ReplicatedLinear(nn.Linear):
    """A linear without bias that every tensor-parallel rank holds whole and runs on its part of the sequence.

    Args:
        input_size: width.
        output_size: width.
        config: initialisation, dtype, and whether the sequence is sharded.
    """

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__(
            input_size, output_size, bias=False, device=parameter_device(config), dtype=config.params_dtype
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        # Its gradient is then a sum over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None
