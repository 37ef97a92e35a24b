"""A run's folder of checkpoints: which are whole, and what the others lack. Reads names and sizes; nothing slow.

Layout of ``<output_dir>/checkpoints``::

    step_00000050/                      complete: megatron's shards, its metadata.json, and run.json
    step_00000100.<token>.incomplete/   being written, or left by a killed run; removed at the next start

``run.json`` is written last and holds the size of every other file, so that a file which was cut later is found without
reading it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.json_text import read_json, texts
from hybridprune_megatron.config.legacy import is_flat, nested
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.plugins import from_a_file

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

RUN_FILE = "run.json"
INCOMPLETE = ".incomplete"
_METADATA = "metadata.json"
_NAME = re.compile(r"step_(\d+)")


def checkpoint_folder(cfg: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(cfg.output_dir) / "checkpoints"


def copies_folder(cfg: Config) -> Path | None:
    """Where a run keeps copies of its checkpoints; None: nowhere."""
    where = cfg.trainer.copy_checkpoints_to
    return None if where is None else Path(where)


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


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint except ``run.json``, by name."""
    return {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != RUN_FILE}


def read_run_file(checkpoint: Path) -> dict[str, Any]:
    """``run.json`` of a checkpoint: step, consumed_samples, layout, files, the resolved configuration, versions.

    Raises:
        ValueError: it cannot be read, or is not a JSON object.
    """
    content = read_json(checkpoint / RUN_FILE)
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint / RUN_FILE} is not a JSON object: name a checkpoint that a run wrote")
    return content


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, as plain values, in the keys of today.

    Raises:
        ValueError: there is none, it asks for values from elsewhere (a saved one is resolved), or its reduction is one
            of version 0.1 with values that were not allowed.
    """
    found = read_run_file(checkpoint).get("config")
    if not isinstance(found, dict):
        raise ValueError(f"{checkpoint / RUN_FILE} has no configuration: name a checkpoint that a run wrote")
    asking = next((value for value in texts(found) if "${" in value), None)
    if asking is not None:
        raise ValueError(
            f"{checkpoint / RUN_FILE} has {asking!a:.80} in its configuration, which is not a resolved value"
        )
    reduction = found.get("reduction")
    if isinstance(reduction, dict):
        with from_a_file():
            complete = ReductionConfig.of(reduction).plain() if is_flat(reduction) else nested(reduction)
            found["reduction"] = json.loads(json.dumps(complete))
    return found


def damage(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in a few words; None if it is whole as far as names and sizes tell."""
    for name in (_METADATA, RUN_FILE):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        sizes = read_run_file(checkpoint).get("files", {})
    except ValueError:
        return f"{RUN_FILE} is cut off"
    if not isinstance(sizes, dict):
        return f"{RUN_FILE} lists no files"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def _named_checkpoints(directory: Path) -> list[Path]:
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=checkpoint_step)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first; empty if the folder does not exist."""
    return [path for path in _named_checkpoints(directory) if damage(path) is None]


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint in a folder, or None."""
    return next((path for path in reversed(_named_checkpoints(directory)) if damage(path) is None), None)


def own_copies(folder: Path, output_dir: str) -> list[Path]:
    """Whole checkpoints in a second place that a run wrote, oldest first; other runs' may lie beside them.

    Args:
        folder: may not be there.
        output_dir: of the run, as it is written in every checkpoint.
    """
    try:
        return [path for path in complete_checkpoints(folder) if not path.is_symlink() and _is_of(path, output_dir)]
    except OSError:
        # A disk that is gone has none.
        return []


def _is_of(checkpoint: Path, output_dir: str) -> bool:
    config = read_run_file(checkpoint).get("config")
    return isinstance(config, dict) and config.get("output_dir") == output_dir


def newest_of_run(cfg: Config) -> Path | None:
    """The newest whole checkpoint of a run, of its folder and of the copies; that of its folder where both have it."""
    folder = copies_folder(cfg)
    copies = [] if folder is None else own_copies(folder, cfg.output_dir)
    newest = latest_checkpoint(checkpoint_folder(cfg))
    found = [*copies[-1:], *([newest] if newest is not None else [])]
    return max(reversed(found), key=checkpoint_step, default=None)


def outdated_checkpoints(
    directory: Path, own: Collection[int], keep_last: int, keep_every_n_steps: int = 0, best: int | None = None
) -> list[Path]:
    """The whole checkpoints that a run may remove, oldest first.

    Args:
        directory: the run's checkpoint folder.
        own: steps of the checkpoints that the run wrote; no other is named.
        keep_last: of these, how many stay, the newest included.
        keep_every_n_steps: those of multiples of it stay; 0: of none.
        best: the one of this step stays.
    """
    whole = [path for path in complete_checkpoints(directory) if checkpoint_step(path) in own and not path.is_symlink()]
    kept = {best, *map(checkpoint_step, whole[-keep_last:])}
    if keep_every_n_steps:
        kept |= {step for step in own if step % keep_every_n_steps == 0}
    return [path for path in whole if checkpoint_step(path) not in kept]


def resume_point(directory: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and a line for every newer one that is damaged.

    Returns:
        The newest whole checkpoint (None: a run that has not saved yet), and the lines, newest first.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    lines: list[str] = []
    for path in reversed(_named_checkpoints(directory)):
        what = damage(path)
        if what is None:
            return path, lines
        lines.append(f"{path} is damaged ({what}) and left out")
    if lines:
        raise ValueError(
            f"{'; '.join(lines)}: no whole checkpoint is left in {directory}; delete that folder to start over"
        )
    return None, lines


def remove_incomplete(directory: Path) -> None:
    """Deletes what killed runs left. Rank 0 only, before anything is saved."""
    if directory.is_dir():
        for path in directory.glob(f"*{INCOMPLETE}"):
            # A writer that outlived its run may still add files; it has its own folder and harms nobody.
            shutil.rmtree(path, ignore_errors=True)
