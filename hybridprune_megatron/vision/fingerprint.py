"""A short name for a vision tower, equal only for towers that compute the same."""

from __future__ import annotations

import hashlib

import torch
from transformers import RadioModel

#: Settings that change what a tower computes and show in no weight.
_SETTINGS = ("num_attention_heads", "patch_size", "layer_norm_eps", "norm_mean", "norm_std")


def tower_fingerprint(tower: RadioModel) -> str:
    """16 hexadecimal digits of a SHA-256 over the tower's weights and settings.

    Weights count as rounded to bf16, so that a tower has one name whether it is loaded in fp32 or bf16.
    """
    digest = hashlib.sha256(repr([getattr(tower.config, name) for name in _SETTINGS]).encode())
    for name, value in sorted(tower.state_dict().items()):
        rounded = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(rounded.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
