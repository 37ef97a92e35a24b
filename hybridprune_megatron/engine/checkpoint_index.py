"""Reads weights of a distributed checkpoint from an untrusted source: nothing of it is unpickled into classes.

The index (``.metadata``) is a pickle. It is read with stand-ins for the few types that a genuine one is made of, which
hold what the file says and do nothing. Of the stored entries only tensors are read, by torch's reader for weights; an
entry that is bytes, and would be unpickled without restriction by megatron's own loader, is refused where a weight is
wanted.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.json_text import read_json

_INDEX_FILE, _FORMAT_FILE = ".metadata", "metadata.json"
_FORMAT = "torch_dist"
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "int32",
        "uint8",
        "bool",
    )
}
# All that a genuine index of torch.distributed.checkpoint is made of. Names in full: a pickle may also ask for
# "os.system" of a harmless module that happens to import os.
_INDEX_TYPES = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"PosixPath"},
}


@dataclass(frozen=True)
class Place:
    """Where bytes lie.

    Attributes:
        file: in the checkpoint's folder.
        start: first of them.
        length: their number.
    """

    file: Path
    start: int
    length: int

    def read(self) -> io.BytesIO:
        """The bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return io.BytesIO(stream.read(self.length))

    def load(self) -> Any:
        """What is stored there, by torch's reader of plain values and tensors, which runs nothing.

        Raises:
            ValueError: it is more than those; the message is the reason alone.
        """
        try:
            return torch.load(self.read(), map_location="cpu", weights_only=True)
        # Foreign bytes: whatever the reader raises.
        except Exception as error:
            raise ValueError(" ".join(str(error).split())[:200]) from None


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor.

    Attributes:
        offsets: its first element in each dimension.
        sizes: elements in each dimension.
        place: where it is stored.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """The box, on the CPU.

        Raises:
            ValueError: no such tensor is stored there.
        """
        try:
            value = self.place.load()
        except ValueError as reason:
            raise ValueError(f"{key} in {self.place.file} is not a stored tensor ({reason})") from None
        plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or tuple(value.shape) != self.sizes or value.dtype != dtype:
            raise ValueError(f"{key} in {self.place.file} is not the tensor that the index says")
        return value


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint.

    Attributes:
        dtype: of its elements.
        shape: of the whole.
        chunks: boxes of it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A box of it, on the CPU.

        Raises:
            ValueError: the checkpoint does not hold all of it.
        """
        out = torch.empty(sizes, dtype=self.dtype)
        found = 0
        for chunk in self.chunks:
            low = [max(*pair) for pair in zip(offsets, chunk.offsets)]
            high = [min(a + b, c + d) for a, b, c, d in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if all(first < last for first, last in zip(low, high)):
                there = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, chunk.offsets))
                here = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, offsets))
                out[here] = chunk.read(key, self.dtype)[there]
                found += math.prod(b - a for a, b in zip(low, high))
        if found != out.numel():
            raise ValueError(f"{key} is not whole: {found} of {out.numel()} elements are stored")
        return out


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        folder: of the checkpoint.
        tensors: by key.
        objects: where entries that are not tensors lie, by key.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Place]

    def check_objects(self) -> None:
        """Refuses entries that could run code when they are unpickled: all are plain values and tensors.

        Raises:
            ValueError: naming one.
        """
        for key, place in self.objects.items():
            try:
                place.load()
            except ValueError as reason:
                raise ValueError(
                    f"{self.folder}: {key} is more than plain values and tensors ({reason}); do not load this "
                    "checkpoint"
                ) from None


def read_index(folder: Path) -> Index:
    """The index of a distributed checkpoint.

    Raises:
        ValueError: it has another format, its index would import something, or names files elsewhere, or is broken.
    """
    settings = read_json(file_inside(folder, _FORMAT_FILE))
    found = settings.get("sharded_backend") if isinstance(settings, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{folder / _FORMAT_FILE} has sharded_backend={found!r:.60}: only {_FORMAT} can be read")
    path = file_inside(folder, _INDEX_FILE)
    try:
        if not path.is_file():
            raise ValueError("it is not there")
        with path.open("rb") as stream:
            content = _IndexReader(stream).load()
        tensors, objects = _interpreted(folder, _state(content, "Metadata"))
    # An untrusted pickle can end in any error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint index: {reason:.300}; do not load this checkpoint") from None
    return Index(folder, tensors, objects)


class _Record:
    """An object of the index: what the file says of it, and nothing that its class would do."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> _Record:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes whatever the file gives."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexReader(pickle.Unpickler):
    """Imports nothing: a class is a stand-in of its name, made for this file."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._kinds: dict[str, Any] = {name: f"torch.{name}" for name in _DTYPES}

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise ValueError(f"it would import {module}.{name}, which no checkpoint index needs")
        return self._kinds.setdefault(name, type(name, (_Record,), {}))


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The fields of a record of this kind."""
    if type(record).__name__ != kind or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise ValueError(f"expected a {kind} where it has {type(record).__name__}")
    return record.state


def _size(value: Any) -> tuple[int, ...]:
    """A shape or an offset."""
    if type(value).__name__ == "Size" and isinstance(value, _Record):
        value = value.args[0] if len(value.args) == 1 else ()
    if not isinstance(value, tuple | list) or any(type(each) is not int or each < 0 for each in value):
        raise ValueError(f"{value!r:.80} is not a shape")
    return tuple(value)


def _interpreted(folder: Path, content: dict[str, Any]) -> tuple[dict[str, StoredTensor], dict[str, Place]]:
    places = _places(folder, content["storage_data"])
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Place] = {}
    for key, value in content["state_dict_metadata"].items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r:.80} is not a text")
        if type(value).__name__ == "BytesStorageMetadata" and isinstance(value, _Record):
            objects[key] = places[key, None]
            continue
        fields = _state(value, "TensorStorageMetadata")
        properties = fields["properties"]
        # Its own __getstate__ gives a tuple; the dtype comes first.
        dtype = str(properties.state[0]).removeprefix("torch.")
        shape = _size(fields["size"])
        chunks = tuple(_chunk(key, shape, each, places) for each in fields["chunks"])
        tensors[key] = StoredTensor(_DTYPES[dtype], shape, chunks)
    return tensors, objects


def _chunk(key: str, shape: tuple[int, ...], value: Any, places: Mapping[Any, Place]) -> Chunk:
    fields = _state(value, "ChunkStorageMetadata")
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    inside = len(offsets) == len(sizes) == len(shape)
    if not inside or any(a + b > c for a, b, c in zip(offsets, sizes, shape)):
        raise ValueError(f"{key} has a part at {offsets} of size {sizes}, outside of {shape}")
    return Chunk(offsets, sizes, places[key, offsets])


def _places(folder: Path, storage: Any) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    """Where every part is stored, by key and offset; files outside of the folder are refused."""
    sizes: dict[str, tuple[Path, int]] = {}
    found = {}
    for index, info in storage.items():
        entry, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        name, start, length = place["relative_path"], place["offset"], place["length"]
        if place.get("transform_descriptors"):
            raise ValueError(f"{entry['fqn']!r:.80} is stored as {place['transform_descriptors']!r:.80}")
        if name not in sizes:
            file = file_inside(folder, name)
            sizes[name] = file, file.stat().st_size if file.is_file() else 0
        file, size = sizes[name]
        if not all(type(each) is int and each >= 0 for each in (start, length)) or start + length > size:
            raise ValueError(f"{entry['fqn']!r:.80} lies at {start!r:.40} to +{length!r:.40} of {size} bytes of {name}")
        offset = entry.get("offset")
        found[entry["fqn"], None if offset is None else _size(offset)] = Place(file, start, length)
    return found


def unused(index: Index, used: Set[str]) -> set[str]:
    """Tensors that were not read, of the parts of the model that were, except those that predict more tokens."""
    parts = {key.split(".")[0] for key in used}
    return {key for key in index.tensors.keys() - used if key.split(".")[0] in parts and ".mtp." not in key}
