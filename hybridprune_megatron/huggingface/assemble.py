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
from hybridprune_megatron.huggingface.towers import tower_vision

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
                "--tower needs a folder of model_type radio beside one of a language model without a tower"
            )
        self.parts = (language, tower)
        _, hidden = language.files.shape(language.table.by_ours[_EMBEDDING].theirs[0])
        inputs, inner = round(vision["hidden_size"] / vision["pixel_shuffle"] ** 2), vision["projector_hidden_size"]
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
        raise ValueError(f"{folder} is not a vision tower: give a folder whose config.json has model_type=radio")
    return weights


def vision_values(tower: TranslatedWeights, frame_size: int, hidden_size: int) -> dict[str, Any]:
    """The ``model.vision`` group of a video model with this tower.

    Args:
        frame_size: side of a frame, pixels.

    Raises:
        ValueError: a tower with other blocks than ours.
    """
    return tower_vision(read_config(tower.path), tower.files.shape, tower.table.blocks, frame_size, hidden_size)
