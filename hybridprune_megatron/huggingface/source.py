"""Reads weights one tensor at a time: from our own files, or from a Hugging Face folder under our names."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridprune_megatron.config.flat import leaves
from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.model_schema import ModelConfig
from hybridprune_megatron.huggingface.folder import model_values, read_config, weight_names
from hybridprune_megatron.huggingface.names import CONSTANTS, Rule, WeightNames

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# What a quantized folder of NVIDIA's tools has besides its config.json.
_QUANTIZATION_FILE = "hf_quant_config.json"
# Numbers that are looked at together, so that looking takes no memory worth mentioning.
_AT_A_TIME = 2**18
# By the names of the safetensors format.
_FLOATS = ("BF16", "F16", "F32", "F64")


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
        if (path / _QUANTIZATION_FILE).exists():
            raise ValueError(
                f"{path} has {_QUANTIZATION_FILE}: its weights are quantized, give the folder that they were made from"
            )
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

    def check_float(self, name: str) -> None:
        """Refuses a tensor of another number format, from its header.

        Raises:
            ValueError: naming it.
        """
        dtype = self._file(name).get_slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(
                f"{name} in {self.path} is {dtype}: weights in {', '.join(_FLOATS)} can be read; quantized ones need "
                "their scales, so give the folder that they were made from"
            )

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
        ValueError: the folder has tensors that the table lacks, or lacks some of the table's, or one is not of floats.
    """

    def __init__(self, files: TensorFiles, table: WeightNames, path: Path) -> None:
        table.check_theirs(files.names, str(path))
        for name in table.by_theirs:
            if not name.endswith(CONSTANTS):
                files.check_float(name)
        self.files, self.table, self.path = files, table, path
        # What is left of the last rule's tensors, for one rule gives several of ours.
        self._converted: dict[str, Tensor] = {}

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors."""
        return self.table.by_ours.keys()

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: it has values that are not finite, or another size than config.json gives it.
        """
        if name not in self._converted:
            rule = self.table.by_ours[name]
            tensors = [self.files.read(other) for other in rule.theirs]
            for other, value in zip(rule.theirs, tensors):
                check_finite(other, value)
            self._converted = self._to_ours(rule, tensors)
        # Handed out, not kept: a whole layer of a large model would wait here for nothing.
        return self._converted.pop(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, from headers."""
        found: dict[str, tuple[int, ...]] = {}
        for rule in self.table.rules:
            tensors = [torch.empty(self.files.shape(name), device="meta") for name in rule.theirs]
            found |= {name: tuple(value.shape) for name, value in self._to_ours(rule, tensors).items()}
        return found

    def _to_ours(self, rule: Rule, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        try:
            ours = rule.to_ours(tensors, self.table.heads)
        except (RuntimeError, IndexError):
            ours = []
        if len(ours) != len(rule.ours):
            sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(rule.theirs, tensors))
            raise ValueError(f"{sizes}: not the sizes of config.json")
        return dict(zip(rule.ours, ours))


def check_finite(name: str, value: Tensor) -> None:
    """Refuses a weight with values that are NaN or infinite: it is broken, and a model with it computes nothing.

    Raises:
        ValueError: naming it.
    """
    wrong = sum(int((~part.isfinite()).sum()) for part in value.reshape(-1).split(_AT_A_TIME))
    if wrong:
        raise ValueError(
            f"{name} has {wrong} values that are NaN or infinite: the weights are broken, fetch them again"
        )


def _files_by_name(path: Path) -> dict[str, Path]:
    index = path / INDEX_FILE
    if path.is_dir() and index.is_file():
        if (path / WEIGHTS_FILE).exists():
            # transformers reads the one, other programs the other.
            raise ValueError(f"{path} has both {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is not the model's")
        return _indexed(path, index)
    file = file_inside(path, WEIGHTS_FILE) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no weights: give a .safetensors file, a folder with {WEIGHTS_FILE} or {INDEX_FILE}, or a "
            "distributed checkpoint"
        )
    return dict.fromkeys(_opened(file).keys(), file)


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    content = read_json(file_inside(folder, index.name))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not an index of safetensors files (no weight_map): fetch it again")
    paths = {file: file_inside(folder, file) for file in {str(file) for file in weight_map.values()}}
    files = {name: paths[str(file)] for name, file in weight_map.items()}
    missing = sorted(name for name, file in paths.items() if not file.is_file())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of its weight files, first {missing[0]}: fetch them again")
    held = {file: set(_opened(file).keys()) for file in paths.values()}
    lost = sorted(name for name, file in files.items() if name not in held[file])
    if lost:
        raise ValueError(
            f"{index} looks for {lost[0]} in {files[lost[0]].name}, which does not hold it: fetch both again"
        )
    return files


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}): fetch it again") from None


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))


# Speed, the longest context, how a router learns, the size that frames are shown at, and how the tower's prefix tokens
# divide.
_FREE = {
    "name",
    "mamba_chunk_size",
    "experts.bias_update_rate",
    "max_sequence_length",
    "vision.frame_size",
    "vision.num_cls_tokens",
    "vision.num_register_tokens",
}


def check_same_model(weights: TranslatedWeights, model: ModelConfig) -> None:
    """Compares what the folder's config.json says with the configuration.

    Raises:
        ValueError: naming the first setting that differs.
    """
    theirs = model_values(model.name, read_config(weights.path), weights.files.shape, weights.table)
    ours = dict(leaves(asdict(model)))
    ours["hybrid_pattern"] = model.hybrid_pattern.replace("|", "")
    for key, value in leaves(theirs):
        if key not in _FREE and ours.get(key) != value:
            raise ValueError(f"its config.json says {key}={value}, and model.{key}={ours.get(key)}; set the same")
