"""A video model from two folders: a language model and a RADIO tower, with a projector that begins at random."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.huggingface.folder import read_config
from hybridprune_megatron.huggingface.source import TranslatedWeights, open_weights

# Of the projector's weights, as Nemotron Nano V2 VL has it: as wide inside as an MLP of its language model.
_PROJECTOR_RATIO = 4
_PIXEL_SHUFFLE = 0.5
_INIT_STD = 0.02
_EMBEDDING = "language_model.embedding.word_embeddings.weight"


class AssembledWeights:
    """The weights of a language model's folder, of a tower's, and of a new projector, under our names.

    Args:
        language: of a ``nemotron_h`` folder.
        tower: of a ``radio`` folder.
        vision: ``model.vision`` of the whole, from ``vision_values``.

    Raises:
        ValueError: the folders are of other models.
    """

    def __init__(self, language: TranslatedWeights, tower: TranslatedWeights, vision: Mapping[str, Any]) -> None:
        if language.table.blocks or tower.table.family != "radio":
            raise ValueError(
                "--tower wants a folder of model_type radio beside one of a language model without a tower"
            )
        self.parts = (language, tower)
        _, hidden = language.files.shape(language.table.by_ours[_EMBEDDING].theirs[0])
        inputs, inner = round(vision["hidden_size"] / _PIXEL_SHUFFLE**2), vision["projector_hidden_size"]
        self.projector = {
            "mlp1.0.weight": (inputs,),
            "mlp1.1.weight": (inner, inputs),
            "mlp1.3.weight": (hidden, inner),
        }

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors."""
        language, tower = self.parts
        return {**language.table.by_ours, **tower.table.by_ours, **self.projector}.keys()

    def read(self, name: str) -> Tensor:
        """One tensor; the projector's are drawn, the same every time."""
        for part in self.parts:
            if name in part.names:
                return part.read(name)
        shape = self.projector[name]
        dtype = self.parts[0].read(_EMBEDDING).dtype
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(list(self.projector).index(name))
        return (torch.randn(shape, generator=generator) * _INIT_STD).to(dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        language, tower = self.parts
        return language.shapes() | tower.shapes() | self.projector


def open_tower(folder: Path) -> TranslatedWeights:
    """The weights of a RADIO folder as transformers writes it.

    Raises:
        ValueError: the folder is of another model.
    """
    weights = open_weights(folder)
    if not isinstance(weights, TranslatedWeights) or weights.table.family != "radio":
        raise ValueError(f"{folder} is no vision tower: give a folder whose config.json has model_type=radio")
    return weights


def vision_values(tower: Path, frame_size: int, hidden_size: int) -> dict[str, Any]:
    """The ``model.vision`` group of a video model with this tower.

    Args:
        tower: a RADIO folder.
        frame_size: side of a frame, pixels.
        hidden_size: of the language model.

    Raises:
        ValueError: a tower with other blocks than ours.
    """
    config = read_config(tower)
    for key, wanted in (("use_swiglu_ffn", False), ("qkv_bias", True), ("hidden_act", "gelu")):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{tower}/config.json has {key}={config[key]}: only {key}={wanted} is supported")
    return {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": round(config["hidden_size"] * config.get("mlp_ratio", 4.0)),
        "patch_size": config["patch_size"],
        "frame_size": frame_size,
        "position_grid_px": config["max_img_size"],
        "num_cls_tokens": config["num_cls_tokens"],
        "num_register_tokens": config["num_registers"],
        "projector_hidden_size": _PROJECTOR_RATIO * hidden_size,
        "pixel_shuffle": _PIXEL_SHUFFLE,
        "image_mean": list(config["norm_mean"]),
        "image_std": list(config["norm_std"]),
    }
