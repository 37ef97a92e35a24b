"""Reads weights one tensor at a time: from our own files, or from a Hugging Face folder under our names."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridprune_megatron.huggingface.folder import read_config, weight_names
from hybridprune_megatron.huggingface.names import WeightNames

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


class Weights(Protocol):
    """Whole tensors by name."""

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


def open_weights(path: str | Path) -> Weights:
    """The weights of a ``.safetensors`` file, of a folder of such files, or of a Hugging Face folder, under our names.

    Nothing is read but headers, and no code of the folder runs.

    Raises:
        ValueError: there are no weights, a file is broken, or the folder is of a model that is not known here.
    """
    path = Path(path)
    files = TensorFiles(path)
    if path.is_dir() and (path / "config.json").is_file():
        return TranslatedWeights(files, weight_names(read_config(path), files.names), path)
    return files


class TensorFiles:
    """Tensors as the files name them.

    Args:
        path: one file, or a folder with ``model.safetensors`` or with an index and its shards.

    Raises:
        ValueError: there are none, or one is broken or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _files_by_name(path)
        self._open: tuple[Path, safe_open] | None = None

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors."""
        return self.files.keys()

    def read(self, name: str) -> Tensor:
        """One tensor. The file that was read last stays open, no other: neighbours share a file."""
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from its header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> safe_open:
        file = self.files[name]
        if self._open is None or self._open[0] != file:
            # The pages of the former file count as memory of this process until it is closed.
            self._open = None
            self._open = (file, _opened(file))
        return self._open[1]


class TranslatedWeights:
    """The weights of a Hugging Face folder under our names.

    Args:
        files: of the folder.
        table: of its model.
        path: for messages.

    Raises:
        ValueError: the folder has tensors that the table lacks, or lacks some of the table's.
    """

    def __init__(self, files: TensorFiles, table: WeightNames, path: Path) -> None:
        table.check_theirs(files.names, str(path))
        self.files, self.table = files, table
        # What is left of the last rule's tensors, for one rule gives several of ours.
        self._converted: dict[str, Tensor] = {}

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors."""
        return self.table.by_ours.keys()

    def read(self, name: str) -> Tensor:
        """One tensor."""
        if name not in self._converted:
            rule = self.table.by_ours[name]
            tensors = [self.files.read(other) for other in rule.theirs]
            self._converted = dict(zip(rule.ours, rule.to_ours(tensors, self.table.heads)))
        # Handed out, not kept: a whole layer of a large model would wait here for nothing.
        return self._converted.pop(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, from headers."""
        found: dict[str, tuple[int, ...]] = {}
        for rule in self.table.rules:
            tensors = [torch.empty(self.files.shape(name), device="meta") for name in rule.theirs]
            try:
                ours = rule.to_ours(tensors, self.table.heads)
            except RuntimeError:
                sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(rule.theirs, tensors))
                raise ValueError(f"{sizes}: not the sizes of config.json") from None
            found |= {name: tuple(value.shape) for name, value in zip(rule.ours, ours)}
        return found


def _files_by_name(path: Path) -> dict[str, Path]:
    index = path / INDEX_FILE
    if path.is_dir() and index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({error!r}): fetch it again") from None
        missing = sorted({file for file in weight_map.values() if not (path / file).is_file()})
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of its weight files, first {missing[0]}: fetch them again")
        return {name: path / file for name, file in weight_map.items()}
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no weights: give a .safetensors file, a folder with {WEIGHTS_FILE} or {INDEX_FILE}, or a "
            "distributed checkpoint"
        )
    return dict.fromkeys(_opened(file).keys(), file)


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no complete safetensors file ({error}): fetch it again") from None


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))
