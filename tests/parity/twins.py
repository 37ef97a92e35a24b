"""Small models with the structure of published ones, as Hugging Face folders: real names, small dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import NemotronHConfig, NemotronHForCausalLM, RadioConfig, RadioModel

from hybridprune_megatron.huggingface.names import Heads, WeightNames

VOCAB = 1024
#: What differs between the twins; patterns are whole periods of the published ones.
STRUCTURES: dict[str, dict[str, Any]] = {
    "12b": {"hybrid_override_pattern": "M-M-M-M*-M-"},
    "9b": {"hybrid_override_pattern": "M-M-MM-M*-", "num_attention_heads": 10},
    "8b": {"hybrid_override_pattern": "M-M*-M-M-", "mamba_head_dim": 16},
    "attention heavy": {"hybrid_override_pattern": "M*-*-M*-*", "num_key_value_heads": 4},
    "a group a head": {"hybrid_override_pattern": "MM*-M", "n_groups": 8},
    # Every token visits 2 of 4 groups of experts, and 4 experts of them.
    "experts": {
        "hybrid_override_pattern": "ME*EM-E",
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 18,
        "moe_shared_expert_intermediate_size": 26,
        "routed_scaling_factor": 2.5,
    },
    "latent experts": {
        "hybrid_override_pattern": "MEM*EM",
        "n_routed_experts": 9,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "moe_latent_size": 14,
        "moe_shared_expert_intermediate_size": 22,
        "routed_scaling_factor": 1.5,
    },
    # Mamba's gated norm has one epsilon here, so only a model without one may have another.
    "no Mamba, another epsilon": {"hybrid_override_pattern": "*-*-", "layer_norm_epsilon": 1e-2},
    # transformers does not tie the embeddings of this family, though its configuration can say so.
    "one group, one key-value head": {
        "hybrid_override_pattern": "M-*M",
        "n_groups": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def language_config(structure: str, time_step_min: float = 0.0) -> NemotronHConfig:
    """transformers' configuration of a twin; it clamps dt at ``time_step_min`` whatever its ``time_step_limit``."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 10,
        "n_groups": 4,
        "chunk_size": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        # Of what dt's bias is drawn from, too.
        "time_step_min": time_step_min or 1e-3,
        "time_step_max": max(0.1, 2 * time_step_min),
    }
    config = NemotronHConfig(**(sizes | STRUCTURES[structure]))
    # One expert after the other: the grouped products want widths that divide by four.
    config._experts_implementation = "eager"
    return config


def language_model(structure: str, seed: int = 0, time_step_min: float = 0.0) -> NemotronHForCausalLM:
    """transformers' model of a twin with random weights.

    transformers clamps dt from below at ``time_step_min`` on every path; Megatron and the original code do not. At 0
    the clamp is taken out.
    """
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(language_config(structure, time_step_min)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "dt_bias", ".D", "conv1d.bias")):
                value.add_(torch.randn_like(value) * 0.1)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.add_(torch.randn_like(value) * 0.2)
    for module in model.modules():
        if hasattr(module, "time_step_limit") and not time_step_min:
            module.time_step_limit = (0.0, float("inf"))
    return model


def write_language_twin(
    folder: Path, structure: str, dtype: torch.dtype = torch.float32, time_step_min: float = 0.0
) -> NemotronHForCausalLM:
    """Writes a twin as transformers does and returns it."""
    model = language_model(structure, time_step_min=time_step_min).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def radio_twin(seed: int = 1) -> RadioModel:
    """transformers' tower of a vision twin: 2 blocks, frames of 32 px in patches of 8, grid of 64 px."""
    torch.manual_seed(seed)
    config = RadioConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        max_img_size=64,
        num_cls_tokens=3,
        num_registers=2,
        summary_idxs=[0, 1, 2],
    )
    model = RadioModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_scale" not in name:
                value.copy_(torch.randn_like(value) * 0.3)
    return model


def write_vision_twin(folder: Path, structure: str = "12b", dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a ``NemotronH_Nano_VL_V2`` folder: names, sub-configurations and dtypes as the published one has them."""
    language, tower = language_model(structure), radio_twin()
    blocks = tower.config.num_hidden_layers
    names = WeightNames("nemotron_vl", "", Heads(1, 1), blocks=blocks)
    own = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    tensors = names.to_theirs(own)
    width, inner = 4 * tower.config.hidden_size, 48
    torch.manual_seed(2)
    tensors |= {
        "mlp1.0.weight": 1 + 0.1 * torch.randn(width),
        "mlp1.1.weight": torch.randn(inner, width) * 0.2,
        "mlp1.3.weight": torch.randn(language.config.hidden_size, inner) * 0.2,
    }
    for name, value in language.state_dict().items():
        tensors["language_model." + name.replace("model.", "backbone.", 1)] = value
    tensors = {name: value.detach().to(dtype).contiguous().clone() for name, value in tensors.items()}
    # These stay as they are in the published checkpoint.
    for name in list(tensors):
        if name.endswith((".A_log", ".D")):
            tensors[name] = tensors[name].float()
    tower_name = "vision_model.radio_model."
    tensors[tower_name + "summary_idxs"] = torch.tensor([0, 1, 2])
    tensors[tower_name + "input_conditioner.norm_mean"] = torch.tensor(tower.config.norm_mean).view(3, 1, 1)
    tensors[tower_name + "input_conditioner.norm_std"] = torch.tensor(tower.config.norm_std).view(3, 1, 1)
    folder.mkdir(parents=True)
    ordered = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, first in enumerate(range(0, len(ordered), 25), 1):
        file = f"model-{number:05d}-of-{-(-len(ordered) // 25):05d}.safetensors"
        save_file({name: tensors[name] for name in ordered[first : first + 25]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(ordered[first : first + 25], file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    llm = language.config.to_dict()
    llm["hybrid_override_pattern"] = STRUCTURES[structure]["hybrid_override_pattern"]
    config = {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "model_type": "NemotronH_Nano_VL_V2",
        "auto_map": {"AutoConfig": "configuration.NemotronH_Nano_VL_V2_Config"},
        "force_image_size": 32,
        "downsample_ratio": 0.5,
        "patch_size": 8,
        "ps_version": "v2",
        "projector_hidden_size": inner,
        "vit_hidden_size": tower.config.hidden_size,
        "norm_mean": list(tower.config.norm_mean),
        "norm_std": list(tower.config.norm_std),
        "vision_config": {"args": {"model": "vit_twin_patch8"}, "num_attention_heads": 2, "patch_size": 8},
        "llm_config": llm,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
