"""transformers' ``nemotron_h`` with the weights of a model of ours."""

from __future__ import annotations

import re
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from hybridprune_megatron.config.schema import ModelConfig
from hybridprune_megatron.engine.weights import whole_weights
from hybridprune_megatron.export.write import language_sizes
from hybridprune_megatron.huggingface.names import ExpertParts, Heads, WeightNames
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.weight")


def transformers_config(shape: ModelConfig) -> NemotronHConfig:
    """The same language model as transformers describes it."""
    experts = shape.experts
    sizes = {}
    if experts is not None:
        sizes = {
            "n_routed_experts": experts.num_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "moe_intermediate_size": experts.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
            "moe_latent_size": experts.latent_size,
            "routed_scaling_factor": experts.routed_scaling,
            "n_group": experts.num_groups,
            "topk_group": experts.groups_per_token,
        }
    return NemotronHConfig(**language_sizes(shape), **sizes)


def transformers_peer(model: VideoLanguageModel, shape: ModelConfig) -> NemotronHForCausalLM:
    """The same language model as transformers computes it, in eval mode on the same device.

    Args:
        model: unsplit.
    """
    experts = shape.experts
    peer = NemotronHForCausalLM(transformers_config(shape))
    for module in peer.modules():
        # transformers clamps dt at time_step_min whatever its configuration says.
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (shape.time_step_min, float("inf"))
    heads = Heads(shape.num_query_groups, shape.kv_channels)
    parts = ExpertParts.of(asdict(experts)) if experts is not None else None
    table = WeightNames("nemotron_h", shape.hybrid_pattern, heads, experts=parts)
    weights = whole_weights(model)
    theirs = table.to_theirs({name: weights[name] for name in table.by_ours})
    renamed = {name.replace("backbone.", "model.", 1): value for name, value in theirs.items()}
    weight = next(model.language_model.parameters())
    peer.load_state_dict(_as_in_memory(renamed))
    return peer.to(weight.device, weight.dtype).eval()


def _as_in_memory(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' model holds a layer's experts in one tensor, where files have one each."""
    stacked: dict[str, list[Tensor]] = {}
    for name, value in weights.items():
        # Experts come in the order of their numbers.
        stacked.setdefault(_EXPERT.sub(r".experts.\1", name), []).append(value)
    return {name: torch.stack(each) if ".experts." in name else each[0] for name, each in stacked.items()}
