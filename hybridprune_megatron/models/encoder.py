"""Frames to language-model embeddings: RADIO tower, pixel shuffle, projector. Shared by training and export.

Shape letters: F frames, h x w patches a frame, D tower width, M tokens a frame, O language model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import RadioConfig, RadioModel


class SquaredReLU(nn.Module):
    """``relu(x)^2``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.square(torch.relu(x))


def radio_config(vision: Mapping[str, Any]) -> RadioConfig:
    """The tower's configuration in transformers' words, from the fields of ``model.vision``."""
    return RadioConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_layers"],
        num_attention_heads=vision["num_attention_heads"],
        mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
        patch_size=vision["patch_size"],
        max_img_size=vision["position_grid_px"],
        num_cls_tokens=vision["num_cls_tokens"],
        num_registers=vision["num_register_tokens"],
        summary_idxs=[0],
        norm_mean=list(vision["image_mean"]),
        norm_std=list(vision["image_std"]),
        attn_implementation="sdpa",
    )


def build_projector(tower_width: int, shuffle: float, hidden_size: int, output_size: int) -> nn.Sequential:
    """``mlp1`` of Nemotron Nano V2 VL: RMSNorm, linear, squared ReLU, linear; no bias.

    Args:
        tower_width: D.
        shuffle: pixel shuffle factor; the input is D / shuffle^2 wide.
        hidden_size: width between the linears.
        output_size: O.
    """
    input_size = round(tower_width / shuffle**2)
    return nn.Sequential(
        nn.RMSNorm(input_size, eps=1e-5),
        nn.Linear(input_size, hidden_size, bias=False),
        SquaredReLU(),
        nn.Linear(hidden_size, output_size, bias=False),
    )


def pixel_shuffle(features: Tensor, factor: float) -> Tensor:
    """Folds blocks of neighbouring patches into channels (version "v2" of the InternVL family).

    Args:
        features: [F, h, w, D].
        factor: 0.5 folds 2 x 2 patches into one token.

    Returns:
        [F, h * factor, w * factor, D / factor^2], rows and columns in their original order.
    """
    frames, height, width, channels = features.shape
    x = features.reshape(frames, height, int(width * factor), int(channels / factor))
    x = x.permute(0, 2, 1, 3)
    x = x.reshape(frames, int(width * factor), int(height * factor), int(channels / factor**2))
    return x.permute(0, 2, 1, 3)


def encode_frames(
    tower: RadioModel, projector: nn.Module, pixels: Tensor, shuffle: float, trainable_tower: bool
) -> Tensor:
    """Embeds frames.

    Args:
        tower: patches to features; normalises with its own mean and std.
        projector: from ``build_projector``.
        pixels: uint8 [F, 3, height, width].
        shuffle: pixel shuffle factor.
        trainable_tower: False runs the tower without recording gradients.

    Returns:
        [F, M, O] in the dtype of tower and projector.
    """
    return projector(frame_tokens(tower, pixels, shuffle, trainable_tower))


def frame_tokens(tower: RadioModel, pixels: Tensor, shuffle: float, trainable_tower: bool) -> Tensor:
    """What the projector gets: ``encode_frames`` without it.

    Returns:
        [F, M, D / shuffle^2] in the tower's dtype.
    """
    dtype = next(tower.parameters()).dtype
    with torch.set_grad_enabled(trainable_tower and torch.is_grad_enabled()):
        features = tower(pixels.to(dtype) / 255).features
    patch = tower.config.patch_size
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    tokens = pixel_shuffle(features.unflatten(1, (height, width)), shuffle)
    return tokens.flatten(1, 2)
