"""Loads the weights a run starts from: .safetensors files, a Hugging Face folder, or a distributed checkpoint, into
any parallel layout.

Names are those of the model's sharded state dict, which are the names of ``state_dict()`` of the unsplit
model. Only tensors are read (``checkpoint_index``): weights may come from an untrusted source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from hybridprune_megatron.config.model_schema import ModelConfig
from hybridprune_megatron.config.outputs import whole_file
from hybridprune_megatron.config.weight_files import holds_tensors
from hybridprune_megatron.engine.checkpoint import SHARDED_FORMAT
from hybridprune_megatron.engine.checkpoint_index import Index, StoredTensor, read_index, unused
from hybridprune_megatron.huggingface.files import save_tensors
from hybridprune_megatron.huggingface.names import CONSTANTS
from hybridprune_megatron.huggingface.source import TranslatedWeights, check_finite, check_same_model, open_weights
from hybridprune_megatron.models.lora import is_adapter

#: What a file that ``save_weights`` wrote says of itself.
MADE_BY = "scripts/save_weights.py"


def load_initial_weights(module: MegatronModule, path: str | Path, model: ModelConfig | None = None) -> None:
    """Overwrites the weights of a freshly built model, before it is wrapped for training. Every rank calls
    it.

    Args:
        module: any tensor/pipeline split; every weight must be in the file, and every weight of the file in
            some rank's model. Adapters may be missing all together: then they stay as they were built.
        path: a ``.safetensors`` file or a folder of such files (hybridprune import), a Hugging Face folder of a
            family that ``huggingface.names`` knows, or a distributed checkpoint folder (ours or stock megatron's).
        model: the module's configuration, which a Hugging Face folder's has to equal; None: only shapes are compared.

    Raises:
        ValueError: if the path does not exist, names, shapes or settings differ, or a weight is not a finite float.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"model.init_checkpoint={path} does not exist; give a .safetensors file, a checkpoint folder, or null"
        )
    if holds_tensors(path):
        _load_tensors(module, path, model)
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
    with whole_file(Path(path)) as scratch:
        save_tensors(weights, scratch, {"made_by": MADE_BY})


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
        names: all keys of the file.

    Raises:
        ValueError: the file has adapters and the model does not.
    """
    sharded = _sharded_tensors(module)
    if not any(is_adapter(name) for name in names):
        return {name: entry for name, entry in sharded.items() if not is_adapter(name)}
    if not any(is_adapter(name) for name in sharded):
        raise ValueError(
            f"model.init_checkpoint={path} holds adapters that the model lacks: set the tuning.lora of its run, or "
            "merge them into the weights (scripts/save_weights.py)"
        )
    return sharded


def _assign(module: MegatronModule, loaded: dict[str, Any], partly: bool = False) -> None:
    missing, unexpected = module.load_state_dict(loaded, strict=False)
    # Extra states are the only entries of a state dict that are not tensors; adapters may be left as they were built.
    missing = [name for name in missing if not name.endswith("_extra_state") and not is_adapter(name)]
    assert partly or not missing, f"weights without a value: {missing[:5]}"
    assert not unexpected, f"values without a weight: {unexpected[:5]}"


def _load_tensors(module: MegatronModule, path: Path, model: ModelConfig | None) -> None:
    try:
        weights = open_weights(path)
        if isinstance(weights, TranslatedWeights) and model is not None:
            check_same_model(weights, model)
    except ValueError as error:
        raise ValueError(f"model.init_checkpoint={path}: {error}") from None
    names = weights.names
    used: set[str] = set()
    with torch.no_grad():
        # One after the other, so that no more than one whole weight is held beside the model.
        for name, entry in _tensors_to_load(module, names, path).items():
            if entry.key in names:
                value = weights.read(entry.key)
                if not isinstance(weights, TranslatedWeights):
                    # That of a Hugging Face folder is checked as it is read.
                    _check_value(entry.key, value, path)
                _assign(module, {name: _local_part(entry, value, path)}, partly=True)
                used.add(entry.key)
            elif not entry.key.endswith(CONSTANTS):
                raise ValueError(
                    f"model.init_checkpoint={path} has no weight {entry.key!r}; it is of another model, check model=..."
                )
    _refuse_unused(names - _used_anywhere(used), path)


def _used_anywhere(used: set[str]) -> set[str]:
    """What any rank's model has used."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, used)
    return set.union(*everywhere)


def _refuse_unused(left: Iterable[str], path: Path) -> None:
    """A weight that no rank's model has means that the file is of another model."""
    first = min(left, default=None)
    if first is not None:
        raise ValueError(f"model.init_checkpoint={path} holds weights that the model lacks: {first}; check model=...")


def _local_part(entry: ShardedTensor | ShardedTensorFactory, full: torch.Tensor, path: Path) -> torch.Tensor:
    """This rank's part of a whole weight."""
    if isinstance(entry, ShardedTensor):
        return _slice(entry, full, path)
    # A factory (Mamba's in_proj and conv, gated MLPs) holds several weights in one, side by side on dim 0,
    # each split by itself.
    offset = 0

    def read(part: ShardedTensor) -> torch.Tensor:
        nonlocal offset
        offset += part.global_shape[0]
        return _slice(part, full[offset - part.global_shape[0] : offset], path)

    own = _read_entry(entry, read)
    if offset != full.shape[0]:
        raise ValueError(
            f"model.init_checkpoint={path}: {entry.key}: {full.shape[0]} rows, in the model {offset}; check model=..."
        )
    return own


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


def _check_value(key: str, value: torch.Tensor, path: Path) -> None:
    """Refuses what no weight can be: quantized numbers without their scales, NaN and infinity."""
    wanted = () if key.endswith(CONSTANTS) else (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if wanted and value.dtype not in wanted:
        raise ValueError(
            f"model.init_checkpoint={path}: {key} is {str(value.dtype).removeprefix('torch.')}, which needs scales; "
            "give weights in bf16, fp16 or fp32"
        )
    try:
        check_finite(key, value)
    except ValueError as error:
        raise ValueError(f"model.init_checkpoint={path}: {error}") from None


def _load_distributed(module: MegatronModule, path: Path) -> None:
    if not (path / "metadata.json").is_file():
        raise ValueError(
            f"model.init_checkpoint={path} is a folder without metadata.json; name a complete checkpoint's folder"
        )
    index = read_index(path)
    used: set[str] = set()
    with torch.no_grad():
        for name, entry in _tensors_to_load(module, index.tensors, path).items():
            # One after the other, as above.
            value = _read_entry(entry, lambda part: _stored_part(index, part, used))
            _check_value(entry.key, value, path)
            _assign(module, {name: value}, partly=True)
    _refuse_unused(unused(index, _used_anywhere(used)), path)


def _read_entry(
    entry: ShardedTensor | ShardedTensorFactory, read: Callable[[ShardedTensor], torch.Tensor]
) -> torch.Tensor:
    """This rank's part of a weight, whose entry may consist of several that are stored under names of their own."""
    if isinstance(entry, ShardedTensor):
        return read(entry)
    return entry.merge_fn(_each_leaf(entry.build(), read))


def _each_leaf(tree: Any, read: Callable[[ShardedTensor], torch.Tensor]) -> Any:
    if isinstance(tree, ShardedTensor):
        return read(tree)
    if isinstance(tree, dict):
        return {name: _each_leaf(branch, read) for name, branch in tree.items()}
    return [_each_leaf(branch, read) for branch in tree]


def _stored_part(index: Index, part: ShardedTensor, used: set[str]) -> torch.Tensor:
    """This rank's part of a stored tensor, whose key joins ``used``."""
    named = f"model.init_checkpoint={index.folder}"
    if part.key in index.objects:
        raise ValueError(
            f"{named} stores {part.key} as bytes that would be unpickled, not as a tensor; do not load this checkpoint"
        )
    stored: StoredTensor | None = index.tensors.get(part.key)
    if stored is None:
        raise ValueError(f"{named} is of another model: it has no weight {part.key!r}; check model=...")
    if stored.shape != tuple(part.global_shape):
        raise ValueError(
            f"{named} is of another model: mismatch of {part.key}, {stored.shape} there and "
            f"{tuple(part.global_shape)} in the model; check model=..."
        )
    sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    try:
        value = stored.read(part.key, tuple(part.global_offset), sizes)
    except ValueError as error:
        raise ValueError(f"{named}: {error}; do not load this checkpoint") from None
    used.add(part.key)
    return value.view(tuple(part.local_shape))
