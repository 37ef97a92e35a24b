"""Loads the weights a run starts from: .safetensors files, a Hugging Face folder, or a distributed checkpoint, into
any parallel layout.

Names are those of the model's sharded state dict, which are the names of ``state_dict()`` of the unsplit
model. Only tensors are read: from a distributed checkpoint no stored object is unpickled, and its index is
checked before it is.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from hybridprune_megatron.config.weight_files import holds_tensors
from hybridprune_megatron.engine.checkpoint import SHARDED_FORMAT
from hybridprune_megatron.huggingface.names import CONSTANTS
from hybridprune_megatron.huggingface.source import open_weights
from hybridprune_megatron.models.lora import is_adapter

# All that a genuine index of torch.distributed.checkpoint is made of. Names in full: a pickle may also ask for
# "os.system" of a harmless module that happens to import os.
_DTYPES = (
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


def load_initial_weights(module: MegatronModule, path: str | Path) -> None:
    """Overwrites the weights of a freshly built model, before it is wrapped for training. Every rank calls
    it.

    Args:
        module: any tensor/pipeline split; every weight must be in the file, and every weight of the file in
            some rank's model. Adapters may be missing all together: then they stay as they were built.
        path: a ``.safetensors`` file or a folder of such files (scripts/import_hf.py), a Hugging Face folder of a
            family that ``huggingface.names`` knows, or a distributed checkpoint folder (ours or stock megatron's).

    Raises:
        ValueError: if the path does not exist, or names or shapes differ.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"model.init_checkpoint={path} does not exist; give a .safetensors file, a checkpoint folder, or null"
        )
    if holds_tensors(path):
        _load_tensors(module, path)
    else:
        _load_distributed(module, path)


def save_weights(module: MegatronModule, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the weights of an unsplit model as one .safetensors file that ``load_initial_weights`` reads.

    Args:
        module: a model of one tensor- and pipeline-parallel rank.
        path: the file; replaced whole or not at all.
        dtype: what weights of more than one dimension are stored in; None: as they are.

    Raises:
        ValueError: the model is split over ranks.
    """
    if (
        parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_pipeline_model_parallel_world_size()
        > 1
    ):
        raise ValueError(
            "a .safetensors file holds whole weights: load the checkpoint with parallel=single to write one"
        )
    weights = whole_weights(module)
    weights = {
        key: value.to(dtype if dtype is not None and value.dim() > 1 else value.dtype).contiguous()
        for key, value in weights.items()
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial)
    partial.replace(path)


def whole_weights(module: MegatronModule) -> dict[str, torch.Tensor]:
    """The weights of an unsplit model under the names of a checkpoint."""
    state = module.state_dict()
    return {entry.key: state[name] for name, entry in _sharded_tensors(module).items()}


def _sharded_tensors(module: MegatronModule) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The model's own tensors; extra state objects of some layers are left out."""
    sharded = module.sharded_state_dict(metadata=dict(SHARDED_FORMAT))
    return {name: entry for name, entry in sharded.items() if not isinstance(entry, ShardedObject)}


def _tensors_to_load(module: MegatronModule, names: Iterable[str], path: Path) -> dict[str, Any]:
    """``_sharded_tensors``, without the adapters if the file has none: new ones change nothing as they are built.

    Args:
        module: the model.
        names: all keys of the file.
        path: for the message.

    Raises:
        ValueError: the file has adapters and the model has not.
    """
    sharded = _sharded_tensors(module)
    if not any(is_adapter(name) for name in names):
        return {name: entry for name, entry in sharded.items() if not is_adapter(name)}
    if not any(is_adapter(name) for name in sharded):
        raise ValueError(
            f"model.init_checkpoint={path} holds adapters that the model has not: set the tuning.lora of its run, or "
            "merge them into the weights (scripts/save_weights.py)"
        )
    return sharded


def _assign(module: MegatronModule, loaded: dict[str, Any], partly: bool = False) -> None:
    missing, unexpected = module.load_state_dict(loaded, strict=False)
    # Extra states are the only entries of a state dict that are not tensors; adapters may be left as they were built.
    missing = [name for name in missing if not name.endswith("_extra_state") and not is_adapter(name)]
    assert partly or not missing, f"weights without a value: {missing[:5]}"
    assert not unexpected, f"values without a weight: {unexpected[:5]}"


def _load_tensors(module: MegatronModule, path: Path) -> None:
    try:
        weights = open_weights(path)
    except ValueError as error:
        raise ValueError(f"model.init_checkpoint={path}: {error}") from None
    names = weights.names
    used: set[str] = set()
    with torch.no_grad():
        # One after the other, so that no more than one whole weight is held beside the model.
        for name, entry in _tensors_to_load(module, names, path).items():
            if entry.key in names:
                _assign(module, {name: _local_part(entry, weights.read(entry.key), path)}, partly=True)
                used.add(entry.key)
            elif not entry.key.endswith(CONSTANTS):
                raise ValueError(
                    f"model.init_checkpoint={path} has no weight {entry.key!r}; it is of another model, check model=..."
                )
    _refuse_unused(set(names) - used, path)


def _refuse_unused(unused: set[str], path: Path) -> None:
    """A weight that no rank's model has means that the file is of another model."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, unused)
    nowhere = sorted(set.intersection(*everywhere))
    if nowhere:
        raise ValueError(
            f"model.init_checkpoint={path} holds weights that the model has not: {nowhere[0]}, ...; check model=..."
        )


def _local_part(entry: ShardedTensor | ShardedTensorFactory, full: torch.Tensor, path: Path) -> torch.Tensor:
    """This rank's part of a whole weight."""
    if isinstance(entry, ShardedTensor):
        return _slice(entry, full, path)
    # A factory (Mamba's in_proj and conv, gated MLPs) holds several weights in one, side by side on dim 0,
    # each split by itself.
    parts, offset = [], 0
    for part in _leaves(entry.build()):
        rows = part.global_shape[0]
        parts.append(_slice(part, full[offset : offset + rows], path))
        offset += rows
    if offset != full.shape[0]:
        raise ValueError(
            f"model.init_checkpoint={path}: {entry.key}: {full.shape[0]} rows, in the model {offset}; check model=..."
        )
    return entry.merge_fn(parts) if not isinstance(entry.build(), dict) else torch.cat(parts)


def _leaves(tree: Any) -> list[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        return [tree]
    return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(branch)]


def _slice(entry: ShardedTensor, full: torch.Tensor, path: Path) -> torch.Tensor:
    axes = entry.prepend_axis_num
    shape = tuple(entry.global_shape[axes:])
    if tuple(full.shape) != shape:
        raise ValueError(
            f"model.init_checkpoint={path}: {entry.key} is {tuple(full.shape)}, in the model {shape}; check model=..."
        )
    for dim, (start, size) in enumerate(zip(entry.global_offset[axes:], entry.local_shape)):
        full = full.narrow(dim, start, size)
    return full


def _load_distributed(module: MegatronModule, path: Path) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(
            f"model.init_checkpoint={path} is a folder without metadata.json; name a complete checkpoint's folder"
        )
    check_index(path / ".metadata")
    with torch.no_grad():
        wanted = _tensors_to_load(module, dist_checkpointing.load_tensors_metadata(str(path)), path)
        try:
            loaded = dist_checkpointing.load(dict(wanted), str(path))
        except CheckpointException as error:
            # torch wraps what a rank's plan raised, a missing or misshapen weight; it is no Exception itself.
            reasons = [reason for reason, _ in error.failures.values()]
            raise ValueError(
                f"model.init_checkpoint={path} is of another model: {reasons[0]}; check model=..."
            ) from None
        _assign(module, {name: loaded[name] for name in wanted})


class _IndexReader(pickle.Unpickler):
    """Reads a checkpoint index without importing anything but the index's own types."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"it would import {module}.{name}, which no checkpoint index needs")


def check_index(path: Path) -> None:
    """Refuses a checkpoint index that would import anything but the index's own types when it is unpickled.

    Raises:
        ValueError: naming what it would import.
    """
    with path.open("rb") as stream:
        try:
            _IndexReader(stream).load()
        except (ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is not a checkpoint index: {error}; do not load this checkpoint") from None
