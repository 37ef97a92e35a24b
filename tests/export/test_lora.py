"""Adapters are merged on the way to an export, whose logits are the adapted model's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET, LoraConfig, language_targets
from studies.demo.parity import max_logit_difference
from tests.export.conftest import make_config, make_model
from tests.export.test_measured_parity import samples_of


def test_an_export_is_the_adapted_model(world, inputs, tokenizer_dir: Path, tmp_path: Path) -> None:
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.engine.weights import save_weights
    from hybridprune_megatron.export.write import export_model

    cfg = make_config(tokenizer_dir)
    cfg.tuning.lora = LoraConfig(rank=2, alpha=4, targets=[*language_targets(), PROJECTOR_TARGET])
    adapted = make_model(cfg)
    save_weights(adapted, tmp_path / "adapted.safetensors")
    merged = load_model(tmp_path / "adapted.safetensors", cfg)
    exported = AutoModelForCausalLM.from_pretrained(
        export_model(merged, cfg, tmp_path / "hf"), trust_remote_code=True
    ).eval()
    assert max_logit_difference(adapted, exported, samples_of(inputs)) < 1e-3
    # The adapters do something, or their loss would not show.
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
    adapted.reduction = None
    exported.set_reduction(None)
    assert max_logit_difference(adapted, exported, samples_of(inputs)) > 0.05
