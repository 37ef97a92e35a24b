"""Distributed checkpoints of a whole run: complete or not there, and good for any parallel layout.

All ranks write into a ``.incomplete`` folder (names: :mod:`hybridprune_megatron.config.checkpoint_folder`); after a
barrier rank 0 writes ``run.json``, syncs everything to disk and renames the folder, which is one step for the file
system.

What follows a change of layout: weights and optimizer states are stored whole, a parameter a tensor, so every rank
reads its own part of them under any tensor, pipeline, context and data-parallel size. The loader's state is stored by
stream (:mod:`hybridprune_megatron.data.streams`), which no layout changes. Generators are stored by rank: the same
layout continues them bitwise, another one seeds them anew from the run's seed and the step.

What is stored how (megatron-core 0.19.2): tensors as raw shards; everything else is ``torch.save``d bytes.
Megatron reads these bytes, and the ``.metadata`` index, through pickle. A run's folder may come from somebody else too,
so :func:`load_checkpoint` looks first: the index is made of an index's types, and every stored object of plain values
and tensors, which pickle reads without running anything. :mod:`hybridprune_megatron.engine.weights`, which reads other
people's weights, takes tensors only.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from hybridprune_megatron.config.checkpoint_folder import (
    INCOMPLETE,
    RUN_FILE,
    checkpoint_name,
    damage,
    file_sizes,
    latest_checkpoint,
    outdated_checkpoints,
    read_run_file,
)
from hybridprune_megatron.engine.checkpoint_index import read_index
from hybridprune_megatron.engine.disk import retire, sync_entry, sync_tree
from hybridprune_megatron.engine.optimization import TrainState, allocate_state, load_optimizer_state
from hybridprune_megatron.engine.parallel import from_rank_0
from hybridprune_megatron.engine.rng_state import rng_state
from hybridprune_megatron.engine.second_place import SecondPlace

SHARDED_FORMAT = {
    # Gathers the optimizer's parts over replicas when saving, and gives one tensor a parameter and moment. The other
    # format, dp_reshardable, gathers nothing and fits no other tensor or pipeline size.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # One entry an expert, named by its number.
    "singleton_local_shards": True,
    # One entry a layer and weight, named as in state_dict().
    "non_homogeneous_layers": True,
}


def start_save_helper() -> None:
    """Forks the process that collects what megatron's checkpoint writers report. Repeatable.

    Megatron itself would spawn it at the first save, and every rank would import torch and megatron once more. Call it
    before torch.distributed starts its threads.
    """
    get_write_results_queue("fork")


def layout() -> dict[str, int]:
    """Sizes of the parallel layout in force."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _rng_entry(state: Any) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _loader_entries(states: Mapping[int, Any]) -> dict[str, ShardedObject]:
    """One entry a stream. Processes of one replica read the same data: the first of them stores it."""
    replica = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return {
        str(stream): ShardedObject(f"loader/{stream}", state, (1,), (0,), replica_id=replica)
        for stream, state in states.items()
    }


def _model_and_optimizer(state: TrainState, loading: bool) -> dict[str, Any]:
    model = state.module.sharded_state_dict(metadata=dict(SHARDED_FORMAT))
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(SHARDED_FORMAT))
    return {"model": model, "optimizer": optimizer}


def _reason(error: BaseException) -> str:
    """One line of what went wrong, out of what torch wraps around it."""
    if isinstance(error, CheckpointException):
        # Raised on all ranks; only rank 0 knows what the writers said.
        said = [str(reason) for reason, _ in error.failures.values()][:1] or [""]
        dist.broadcast_object_list(said, src=0)
    else:
        said = [str(error)]
    # Megatron's writer passes on the type of an error only. On a full disk torch raises a RuntimeError.
    why = r"\1, disk full, over quota or not writable"
    return re.sub(r"<class '(OSError|RuntimeError)'>", why, " ".join(said[0].split()))


class CheckpointSaver:
    """Writes the checkpoints of a run into one folder. Every rank has one and makes the same calls.

    With ``asynchronous``, ``save`` returns when this process' values are copied, and a process of its own writes them
    while training continues; the checkpoint is not there until ``finish`` has found that all ranks are done.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int = 2,
        asynchronous: bool = False,
        keep_every_n_steps: int = 0,
        own: Iterable[int] = (),
        second: SecondPlace | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            directory: the run's checkpoint folder.
            keep_last: complete checkpoints that stay, the newest included.
            asynchronous: write in the background.
            keep_every_n_steps: checkpoints of multiples of it stay too; 0: of none.
            own: steps of checkpoints that the run wrote before it was resumed; no others are ever removed.
            second: gets every checkpoint that is whole; on rank 0.
        """
        self._directory = directory
        self._keep_last = keep_last
        self._keep_every = keep_every_n_steps
        self._own = set(own)
        self._second = second
        self._best: int | None = None
        self._queue = AsyncCallsQueue() if asynchronous else None
        self._scratch = directory

    def save(
        self,
        step: int,
        state: TrainState,
        loader: Mapping[int, Any],
        common: Mapping[str, Any],
        run: Mapping[str, Any],
        best: int | None = None,
    ) -> Path:
        """Writes ``directory/step_<step>``, then deletes older checkpoints; waits for the save before it.

        Args:
            step: optimizer steps that are done.
            state: model, optimizer and schedule.
            loader: state of each stream that this rank reads; plain values (str, numbers, lists, dicts, tensors).
            common: plain values, equal on all ranks, that :func:`load_checkpoint` gives back.
            run: JSON values for ``run.json``; "step", "layout" and "files" are added.
            best: step whose checkpoint stays as well.

        Returns:
            The folder of the checkpoint.

        Raises:
            RuntimeError: it could not be written; the checkpoints before it are untouched.
        """
        self.finish(wait=True)
        final = self._directory / checkpoint_name(step)
        # A name of its own: the writer of a killed run may still be at work in the folder of the same step.
        token = [f"{time.time_ns():x}"]
        dist.broadcast_object_list(token, src=0)
        self._scratch = final.with_name(f"{final.name}.{token[0]}{INCOMPLETE}")
        try:
            request = self._request(
                {
                    **_model_and_optimizer(state, loading=False),
                    "rng": _rng_entry(rng_state()),
                    "loader": _loader_entries(loader),
                    "trainer": dict(common),
                    "scheduler": state.scheduler.state_dict(),
                    "step": step,
                }
            )
            header = {"step": step, "layout": layout(), **run}
            request.add_finalize_fn(lambda: self._complete(final, header, best))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)
        except (CheckpointException, OSError) as error:
            raise self._failure(error) from None
        return final

    def _request(self, sharded: dict[str, Any]) -> AsyncRequest:
        """What writes a state into the scratch folder when it is executed."""
        if dist.get_rank() == 0:
            self._scratch.mkdir(parents=True)
        dist.barrier()
        request = dist_checkpointing.save(
            sharded,
            str(self._scratch),
            # Replicas hold the same values: each writes a share.
            FullyParallelSaveStrategyWrapper(
                TorchDistSaveShardedStrategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
            ),
            async_sharded_save=True,
            content_metadata=dict(SHARDED_FORMAT),
            async_strategy="mcore",
        )
        assert request is not None
        return request

    def finish(self, wait: bool) -> None:
        """Completes a save that all ranks have written by now; with ``wait``, waits until they have.

        Raises:
            RuntimeError: it could not be written.
        """
        if self._queue is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, OSError) as error:
            raise self._failure(error) from None

    def _complete(self, final: Path, header: dict[str, Any], best: int | None) -> None:
        """Makes the written folder a checkpoint; every rank calls it when all have written."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                content = {**header, "files": file_sizes(self._scratch)}
                (self._scratch / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                sync_tree(self._scratch)
                if final.exists():
                    retire(final)
                self._scratch.rename(final)
                # Makes the rename durable.
                sync_entry(self._directory)
                # Only now: until this one is whole, those before it are all that there is.
                self._own.add(header["step"])
                self._best = best
                if self._second is not None:
                    self._second.copy(final, best)
                self._remove_outdated()
            except OSError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise OSError(failure[0])

    def finish_copies(self) -> None:
        """Waits for copies that are not made yet, and removes the checkpoints that were kept for them."""
        if self._second is not None:
            self._second.finish()
            self._remove_outdated()

    def _remove_outdated(self) -> None:
        """Rank 0 only. A checkpoint that is being copied goes later."""
        held = set() if self._second is None else self._second.held
        for old in outdated_checkpoints(self._directory, self._own, self._keep_last, self._keep_every, self._best):
            if old not in held:
                retire(old)

    def _failure(self, error: BaseException) -> RuntimeError:
        if dist.get_rank() == 0:
            # What lies there takes the space that a later attempt needs.
            shutil.rmtree(self._scratch, ignore_errors=True)
        newest = latest_checkpoint(self._directory)
        return RuntimeError(
            f"checkpoint {self._scratch.name.partition('.')[0]} in {self._directory} could not be written: "
            f"{_reason(error)}; the newest whole one is {newest.name if newest else 'none'}; make room or give another "
            "output_dir, then start the same command again"
        )


def _check_stored(path: Path) -> None:
    """Refuses a checkpoint that could run code when it is unpickled; one rank looks for all."""
    from_rank_0(lambda: read_index(path).check_objects())


def load_checkpoint(path: Path, state: TrainState, streams: Iterable[int] = ()) -> dict[str, Any]:
    """Loads a complete checkpoint into ``state``. Every rank calls it.

    Args:
        path: a complete checkpoint, of any parallel layout.
        state: freshly built; overwritten.
        streams: the streams of data that this rank reads.

    Returns:
        {"step", "trainer": the ``common`` values that were saved, "loader": states by stream, "rng": for
        :func:`~hybridprune_megatron.engine.rng_state.restore_rng_state`, or None if the layout is another one}.

    Raises:
        ValueError: if the folder is not a complete checkpoint of this version's format.
    """
    what = damage(path)
    if what is not None:
        raise ValueError(
            f"{path} is not a complete checkpoint: {what}; delete it, or name a folder step_<number> with {RUN_FILE}"
        )
    saved_layout = read_run_file(path).get("layout")
    if saved_layout is None:
        raise ValueError(
            f"{path} was written before checkpoints fitted any layout; start a new run from its weights with "
            f"model.init_checkpoint={path} and another output_dir"
        )
    _check_stored(path)
    same = saved_layout == layout()
    # fp32 parameters are the optimizer's own tensors: copying into them must not be recorded.
    with torch.no_grad():
        allocate_state(state.optimizer)
        template = {
            **_model_and_optimizer(state, loading=True),
            "loader": _loader_entries(dict.fromkeys(streams)),
            **({"rng": _rng_entry(None)} if same else {}),
        }
        loaded = dist_checkpointing.load(template, str(path))
        state.module.load_state_dict(loaded["model"])
        load_optimizer_state(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    return {
        "step": loaded["step"],
        "trainer": loaded["trainer"],
        "loader": {int(stream): value for stream, value in loaded.get("loader", {}).items()},
        "rng": loaded["rng"] if same else None,
    }
