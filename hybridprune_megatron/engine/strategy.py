"""The Lightning strategy over megatron-core: Lightning keeps loops, loggers and callbacks, megatron does the rest."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import megatron.core
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from hybridprune_megatron.config.checkpoint_folder import (
    checkpoint_step,
    complete_checkpoints,
    copies_folder,
    remove_incomplete,
)
from hybridprune_megatron.config.flat import config_values, plain_config
from hybridprune_megatron.data.streams import streams_of
from hybridprune_megatron.engine.checkpoint import CheckpointSaver, load_checkpoint, start_save_helper
from hybridprune_megatron.engine.deterministic import choose_algorithms
from hybridprune_megatron.engine.launch import Launch, check_launch
from hybridprune_megatron.engine.module import HybridPruneModule
from hybridprune_megatron.engine.parallel import LaunchedEnvironment, data_rank, init_distributed, init_model_parallel
from hybridprune_megatron.engine.second_place import SecondPlace
from hybridprune_megatron.engine.watch import report_failure, start_watch


class MegatronStrategy(DDPStrategy):
    """Process groups, model, optimizer and checkpoints of a run.

    A DDPStrategy by inheritance because Lightning and NeMo's exp_manager ask for one where there are several
    processes; none of torch's DDP is used. Checkpoints are folders in which every rank writes its part (see
    ``engine.checkpoint``); Lightning's own loop counters travel in their common part.
    """

    def __init__(self, launch: Launch, checkpoints: Path) -> None:
        """Args: launch: what started this process. checkpoints: the run's folder of them."""
        super().__init__(cluster_environment=LaunchedEnvironment(launch))
        self._launch = launch
        self._checkpoints = checkpoints
        self._saver: CheckpointSaver | None = None
        self._second: SecondPlace | None = None
        # Steps of checkpoints that this run wrote before it was resumed.
        self._own: list[int] = []
        self._device = torch.device("cpu")

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        return self._device

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model to load into exists only after setup."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer is restored with the model, by megatron."""
        return False

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Micro batches are the schedule's business."""
        return True

    def _configure_launcher(self) -> None:
        """No launcher: the processes exist already."""

    def _module(self) -> HybridPruneModule:
        module = self.lightning_module
        assert isinstance(module, HybridPruneModule), type(module)
        return module

    def setup_environment(self) -> None:
        """Starts torch.distributed and megatron's groups."""
        cfg = self._module().cfg
        check_launch(self._launch, cfg.trainer.num_nodes, cfg.trainer.devices)
        start_save_helper()
        self._device = init_distributed(self._launch, cfg.trainer.timeout_minutes)
        choose_algorithms(cfg.trainer.deterministic, self._device)
        check_agreement(cfg, versions())
        start_watch(self._launch)
        assert self.accelerator is not None
        self.accelerator.setup_device(self._device)
        self.set_world_ranks()
        rank_zero_only.rank = fabric_rank_zero_only.rank = dist.get_rank()
        parallel = cfg.parallel
        timeout = cfg.trainer.timeout_minutes
        init_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            cfg.trainer.seed,
            timeout,
            parallel.virtual_pipeline,
            parallel.expert,
        )

    def setup(self, trainer: Trainer) -> None:
        """Builds model and optimizer."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._module().build(self._device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a distributed checkpoint; ``filepath`` is its final folder. Called by ``trainer.save_checkpoint``."""
        module = self._module()
        assert module.loader is not None, "a checkpoint before training has no loader state"
        assert Path(filepath).parent == self._checkpoints, (filepath, self._checkpoints)
        if self._saver is None:
            trainer = module.cfg.trainer
            self._saver = CheckpointSaver(
                self._checkpoints,
                trainer.keep_last,
                trainer.async_save,
                trainer.keep_every_n_steps,
                self._own,
                self._second_place(),
            )
        common = {name: checkpoint[name] for name in ("pytorch-lightning_version", "epoch", "global_step", "loops")}
        common["callbacks"] = plain(checkpoint.get("callbacks", {}), "callbacks")
        run = {
            "consumed_samples": module.consumed_samples,
            "world_size": dist.get_world_size(),
            "config": plain_config(module.cfg),
            "versions": versions(),
            "commit": source_commit(),
            "best": module.best,
        }
        loader = {stream: plain(state, "the loader's state") for stream, state in module.loader.save_state().items()}
        best = module.best["step"] if module.best else None
        self._saver.save(checkpoint["global_step"], module.state, loader, common, run, best)

    def finish_save(self, wait: bool) -> None:
        """Completes a save that is written by now, or with ``wait`` when it is."""
        if self._saver is not None:
            self._saver.finish(wait)

    def finish_copies(self) -> None:
        """Waits for copies of checkpoints that are not made yet."""
        if self._saver is not None:
            self._saver.finish_copies()

    def _second_place(self) -> SecondPlace | None:
        """Where this run's checkpoints are copied to; None: nowhere, or another rank does it."""
        cfg = self._module().cfg
        folder = copies_folder(cfg)
        if self._second is None and folder is not None and dist.get_rank() == 0:
            trainer = cfg.trainer
            self._second = SecondPlace(folder, cfg.output_dir, trainer.keep_last, trainer.keep_every_n_steps)
        return self._second

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        """Loads everything of a checkpoint and gives Lightning its own part."""
        module = self._module()
        where = data_rank()
        streams = streams_of(where.rank, where.size, module.cfg.trainer.global_batch_size)
        loaded = load_checkpoint(Path(checkpoint_path), module.state, streams)
        module.resume_from(loaded)
        second = self._second_place()
        if second is not None and Path(checkpoint_path).parent == self._checkpoints:
            # A run that was ended may not have come to it.
            second.copy(Path(checkpoint_path))
        if Path(checkpoint_path).parent in (self._checkpoints, copies_folder(module.cfg)):
            saved = map(checkpoint_step, complete_checkpoints(self._checkpoints))
            self._own = [step for step in saved if step <= loaded["step"]]
        return {**loaded["trainer"], "state_dict": {}, "lr_schedulers": []}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights are saved by megatron, sharded."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done in :meth:`load_checkpoint`."""

    def remove_incomplete(self, directory: Path) -> None:
        """Deletes what killed runs left in a checkpoint folder."""
        if dist.get_rank() == 0:
            remove_incomplete(directory)
        self.barrier()

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks why this one ends."""
        report_failure(exception)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def teardown(self) -> None:
        """Leaves model and groups alone: evaluation may follow in this process (see ``parallel.shut_down``)."""
        assert self.accelerator is not None
        self.accelerator.teardown()


def plain(value: Any, where: str) -> Any:
    """Returns ``value`` if a checkpoint can hold it without pickle.

    Raises:
        ValueError: naming the entry that is not made of plain values and tensors.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor):
        return value
    if isinstance(value, dict):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where} is a {type(value).__name__}; a checkpoint holds plain values and tensors only, store it as those"
    )


def versions() -> dict[str, str]:
    """Versions that decide about digits."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "lightning": lightning.__version__,
    }


_ROOT = Path(__file__).resolve().parents[2]


def source_commit() -> str | None:
    """The commit of this checkout, with a "+" if files differ from it; None where there is no checkout or no git."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


#: Nothing is computed from the clock; logs and files of machines that differ by more are hard to read together.
_MAX_CLOCK_SECONDS = 60.0


def check_agreement(cfg: Any, versions: dict[str, str]) -> None:
    """Refuses a job whose processes were started with different settings. Every rank calls it.

    Args:
        cfg: this rank's configuration, a dataclass.
        versions: this rank's library versions.

    Raises:
        ValueError: on every rank, naming the first rank, key and value that differ from rank 0.
    """
    own = config_values(cfg)
    own |= {f"version of {name}": version for name, version in versions.items()}
    common: list[Any] = [own]
    dist.broadcast_object_list(common, src=0)
    keys = sorted(key for key in own.keys() | common[0].keys() if own.get(key) != common[0].get(key))
    line = None
    if keys:
        key, rank = keys[0], dist.get_rank()
        line = (
            f"{key}={own.get(key)} on rank {rank}, {common[0].get(key)} on rank 0: start every process with the same "
            "command and environment"
        )
    said: list[tuple[str | None, float]] = [(None, 0.0)] * dist.get_world_size()
    dist.all_gather_object(said, (line, time.time()))
    for each, _ in said:
        if each is not None:
            raise ValueError(each)
    times = [now for _, now in said]
    if max(times) - min(times) > _MAX_CLOCK_SECONDS and dist.get_rank() == 0:
        latest, earliest = times.index(max(times)), times.index(min(times))
        ahead = f"rank {latest} is {max(times) - min(times):.0f} s ahead of rank {earliest}"
        print(f"clocks differ: {ahead}; the run does not depend on it, its logs do", flush=True)
