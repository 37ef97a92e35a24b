"""Writes weight files, and copies tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.outputs import check_apart
from hybridprune_megatron.huggingface.source import INDEX_FILE, Weights

#: What a tokenizer folder may hold; anything else in it (weights, other configurations) is not copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer.

    Raises:
        ValueError: one is a link that leads out of its folder.
    """
    for name in TOKENIZER_FILES:
        file = file_inside(source, name)
        if file.is_file():
            shutil.copyfile(file, target / name)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """safetensors' ``save_file``.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:
        # What the library makes of a full disk, or of a folder that may not be written to.
        raise OSError(f"{file} cannot be written ({' '.join(str(error).split())})") from None


def check_weights_file(out: Path, made_by: str, inputs: Iterable[str | Path]) -> None:
    """A command may write a .safetensors file: nothing is there, or what the same command wrote.

    Args:
        made_by: the command; the file's metadata name it as ``made_by``.
        inputs: files and folders that it reads.

    Raises:
        ValueError: something else is there, or it lies in an input.
    """
    check_apart(out, inputs)
    if not os.path.lexists(out):
        return
    try:
        with safe_open(out, framework="pt") as file:
            known = (file.metadata() or {}).get("made_by")
    except (SafetensorError, OSError):
        known = None
    if known != made_by:
        raise ValueError(f"--out={out} exists and was not written by {made_by}: give another file, or remove it first")


def copy_weights(
    weights: Weights, folder: Path, max_bytes: int, progress: Callable[[list[str]], Iterable[str]] = list
) -> None:
    """Writes all weights as .safetensors files with an index, one tensor after the other.

    Args:
        max_bytes: of a file; as much is held in memory, beside one tensor and what is mapped of one file that is read.
        progress: wraps the names, e.g. tqdm.
    """
    writer = ShardWriter(folder, max_bytes)
    for name in progress(list(weights.names)):
        writer.add(name, weights.read(name))
    writer.close()


class ShardWriter:
    """Writes tensors as they come into numbered files and an index; no more than one file is held in memory.

    Args:
        max_bytes: of a file; a larger tensor has one of its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, value: Tensor) -> None:
        """Takes one tensor."""
        held = sum(tensor.nbytes for tensor in self._pending.values())
        if self._pending and held + value.nbytes > self._max_bytes:
            self._flush()
            held = 0
        value = value.detach().contiguous()
        # A view would keep the whole that it is a part of.
        self._pending[name] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        self._total_bytes += value.nbytes
        if held + value.nbytes >= self._max_bytes:
            self._flush()

    def close(self) -> None:
        """Writes what is left, gives the files their final names, and writes the index."""
        if self._pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05d}-of-{len(self._names):05d}.safetensors"
            (self._folder / self._part(number)).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="ascii")

    def _part(self, number: int) -> str:
        return f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._names.append(list(self._pending))
        save_tensors(self._pending, self._folder / self._part(len(self._names)), {"format": "pt"})
        self._pending = {}
