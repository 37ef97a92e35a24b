"""What makes folders of checkpoints appear and go whole, whatever ends the process or the machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hybridprune_megatron.config.checkpoint_folder import INCOMPLETE


def sync_tree(directory: Path) -> None:
    """fsync of every file and folder, so that a rename cannot reach the disk before the data."""
    for path in [*directory.rglob("*"), directory]:
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """fsync of one file, or of a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retire(path: Path, mark: str = "") -> None:
    """Deletes a checkpoint so that no half of it is ever taken for a whole one.

    Args:
        path: of the checkpoint.
        mark: in the name that it has meanwhile, where several runs share a folder.
    """
    doomed = path.with_name(f"{path.name}.old{mark}{INCOMPLETE}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
