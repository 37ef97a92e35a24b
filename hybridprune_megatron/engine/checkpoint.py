"""Distributed checkpoints of a whole run: complete or not there.

Layout of ``<output_dir>/checkpoints``::

    step_00000050/              a complete checkpoint: megatron's shards, its metadata.json, and run.json
    (readable without torch) step_00000100.incomplete/   being written, or what a killed run left; never
    loaded, removed at the next start

All ranks write into the ``.incomplete`` folder; behind a barrier rank 0 syncs it to disk and renames it,
which is one step for the file system.

What is stored how (megatron-core 0.19.2): tensors as raw shards; everything else is ``torch.save``d bytes.
The common part is read back with ``weights_only``, but per-rank objects and the ``.metadata`` index go
through pickle. So resuming trusts the run's own folder, and :mod:`hybridprune_megatron.engine.weights`, which
reads other people's weights, takes tensors only.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from hybridprune_megatron.engine.optimization import TrainState, allocate_state, restore_steps

RUN_FILE = "run.json"
_INCOMPLETE = ".incomplete"
_NAME = re.compile(r"step_(\d+)")
# dp_reshardable: every replica writes its own part of the optimizer, nothing is gathered. A resumed run has
# the same tensor and pipeline sizes; weights alone load into any (see weights.py).
SHARDED_FORMAT = {
    "distrib_optim_sharding_type": "dp_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    # One entry a layer and weight, named as in state_dict().
    "non_homogeneous_layers": True,
}


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's folder name.

    Raises:
        ValueError: if the folder is not named like a checkpoint.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint: its folder is named step_<number>; name one of those")
    return int(match.group(1))


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first; empty if the folder does not exist."""
    if not directory.is_dir():
        return []
    # The name alone says complete; the files are asked for too, for folders that something else has thinned
    # out.
    found = [
        path
        for path in directory.iterdir()
        if _NAME.fullmatch(path.name) and (path / "metadata.json").is_file() and (path / RUN_FILE).is_file()
    ]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def read_run_file(checkpoint: Path) -> dict[str, Any]:
    """``run.json`` of a checkpoint: step, consumed_samples, the resolved configuration, versions."""
    return json.loads((checkpoint / RUN_FILE).read_text())


def remove_incomplete(directory: Path) -> None:
    """Deletes what killed runs left. Rank 0 only, before anything is saved."""
    if directory.is_dir():
        for path in directory.glob(f"*{_INCOMPLETE}"):
            shutil.rmtree(path)


def _rng_state() -> dict[str, Any]:
    """Every generator of this process, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    # numpy's newest form is a dict of plain values and one array.
    generator: Any = np.random.get_state(legacy=False)
    generator["state"]["key"] = torch.from_numpy(generator["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": generator,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`save_checkpoint` stored of the generators. Do it last, right before the first step."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = {**state["numpy"], "state": {**state["numpy"]["state"]}}
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))


def _sharded_state(state: TrainState, per_rank: Any, loader: Any, common: Mapping[str, Any], loading: bool) -> dict:
    """Megatron's description of what to save or load; ``per_rank`` and ``loader`` are None when loading."""
    model = state.module.sharded_state_dict(metadata=dict(SHARDED_FORMAT))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    # Processes of one replica read the same data: the first of them stores the loader's state.
    replica = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(SHARDED_FORMAT)),
        "rng": ShardedObject("rng", per_rank, (dist.get_world_size(),), (dist.get_rank(),)),
        "loader": ShardedObject("loader", loader, (size,), (rank,), replica_id=replica),
        **common,
    }


def _sync_to_disk(directory: Path) -> None:
    """fsync of every file and folder, so that the rename cannot reach the disk before the data."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _retire(path: Path) -> None:
    """Deletes a checkpoint so that no half of it is ever taken for a whole one."""
    doomed = path.with_name(path.name + ".old" + _INCOMPLETE)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def save_checkpoint(
    directory: Path,
    step: int,
    state: TrainState,
    loader_state: Any,
    common: Mapping[str, Any],
    run: Mapping[str, Any],
    keep_last: int = 2,
) -> Path:
    """Writes ``directory/step_<step>`` and then deletes older checkpoints. Every rank calls it.

    Args:
        directory: the run's checkpoint folder.
        step: optimizer steps done.
        state: model, optimizer and schedule.
        loader_state: of this rank's loader; plain values (str, numbers, lists, dicts, tensors).
        common: plain values, equal on all ranks, that :func:`load_checkpoint` gives back.
        run: JSON values for ``run.json``; "step" is added.
        keep_last: complete checkpoints that stay, this one included.

    Returns:
        The folder of the checkpoint.
    """
    final = directory / checkpoint_name(step)
    scratch = final.with_name(final.name + _INCOMPLETE)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    scheduler = state.scheduler.state_dict()
    common = {"trainer": dict(common), "scheduler": scheduler, "step": step}
    sharded = _sharded_state(state, _rng_state(), loader_state, common, loading=False)
    dist_checkpointing.save(sharded, str(scratch), content_metadata=dict(SHARDED_FORMAT))
    dist.barrier()
    if dist.get_rank() == 0:
        (scratch / RUN_FILE).write_text(json.dumps({"step": step, **run}, indent=2) + "\n")
        _sync_to_disk(scratch)
        if final.exists():
            _retire(final)
        scratch.rename(final)
        _sync_to_disk_entry(directory)
        for old in complete_checkpoints(directory)[:-keep_last]:
            _retire(old)
    dist.barrier()
    return final


def _sync_to_disk_entry(directory: Path) -> None:
    """fsync of the folder itself: makes the rename durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, state: TrainState) -> dict[str, Any]:
    """Loads a complete checkpoint into ``state``. Every rank calls it.

    Args:
        path: a complete checkpoint of a run with the same process counts.
        state: freshly built; overwritten.

    Returns:
        {"step", "trainer": the ``common`` values that were saved, "loader": this rank's loader state, "rng":
        for :func:`restore_rng_state`}.

    Raises:
        ValueError: if the folder is not a complete checkpoint, or the number of processes changed.
    """
    if path not in complete_checkpoints(path.parent):
        raise ValueError(
            f"{path} is not a complete checkpoint; delete it, or name a folder step_<number> with {RUN_FILE}"
        )
    saved = read_run_file(path).get("world_size", dist.get_world_size())
    if saved != dist.get_world_size():
        raise ValueError(
            f"{path} was written by {saved} processes, this job has {dist.get_world_size()}: resume with {saved}, or "
            f"start a new run from its weights with model.init_checkpoint={path} and another output_dir"
        )
    # fp32 parameters are the optimizer's own tensors: copying into them must not be recorded.
    with torch.no_grad():
        allocate_state(state.optimizer)
        template = _sharded_state(state, None, None, {}, loading=True)
        loaded = dist_checkpointing.load(template, str(path))
        state.module.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        restore_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    return {name: loaded[name] for name in ("step", "trainer", "loader", "rng")}
