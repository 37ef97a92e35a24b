"""What commands write: it appears whole or not at all, and takes the place of nothing but their own earlier products.

A folder that a command wrote holds a marker: the command's name, and size and time of every file. Only a folder whose
marker says the same command, and whose files are all as the marker has them, is replaced. A file that a command wrote
has the command's name inside.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridprune_megatron.config.json_text import read_json

MARKER = ".made_by.json"
_REMEDY = "give another folder, or remove this one first"
# No report or picture is larger, so a larger file is something else.
_LARGEST_FILE = 2**25


def check_output(out: str | Path, made_by: str, inputs: Iterable[str | Path] = ()) -> Path:
    """Where a command may write its folder.

    Args:
        out: what the user named: nothing, an empty folder, or what an earlier call left.
        made_by: the command, e.g. "scripts/export_hf.py".
        inputs: files and folders that it reads.

    Returns:
        The folder, with all links resolved.

    Raises:
        ValueError: something else is there, or it lies in, above or at an input.
    """
    target = check_apart(out, inputs)
    try:
        found = _not_replaceable(target, made_by)
    except OSError as error:
        raise ValueError(f"--out={out} cannot be used ({_reason(error)}): give another folder") from None
    if found is not None:
        raise ValueError(f"--out={out} {found}: {_REMEDY}")
    return target


def check_apart(out: str | Path, inputs: Iterable[str | Path]) -> Path:
    """An output is none of the inputs, and neither holds the other.

    Returns:
        The output, with all links resolved.

    Raises:
        ValueError: naming the input.
    """
    try:
        target = Path(out).resolve()
        for each in inputs:
            source = Path(each).resolve()
            for found, words in (
                (target == source, "is"),
                (source.is_relative_to(target), "holds"),
                (target.is_relative_to(source), "lies in"),
            ):
                if found:
                    raise ValueError(f"--out={out} {words} {each}, which is read: give another one")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--out={out} cannot be used ({_reason(error)}): give another one") from None
    return target


def check_file(path: Path, made_by: str, option: str) -> None:
    """A command may write a report or a picture: nothing is there, or one of its own, which names it.

    Args:
        option: that names the file, for the message.

    Raises:
        ValueError: something else is there.
    """
    if not os.path.lexists(path):
        return
    try:
        known = path.stat().st_size <= _LARGEST_FILE and made_by.encode() in path.read_bytes()
    except OSError:
        known = False
    if not known:
        raise ValueError(f"{option}={path} exists and was not written by {made_by}: give another file, or remove it")


@contextmanager
def whole_folder(out: str | Path, made_by: str, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A fresh folder next to the target that takes its place at the end; nothing is left of it after an error.

    Args:
        out: as in ``check_output``, which is called before anything is written and again before anything is replaced.

    Raises:
        ValueError: as ``check_output``, or the folder cannot be made.
    """
    target = check_output(out, made_by, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(f"--out={out} cannot be written ({_reason(error)}): give another folder") from None
    try:
        yield scratch
        mark_folder(scratch, made_by)
        # mkdtemp makes folders that only their owner can read.
        scratch.chmod(0o755)
        _put_in_place(scratch, check_output(target, made_by))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A fresh file next to the target that takes its place at the end; nothing is left of it after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        # mkstemp makes files that only their owner can read.
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def mark_folder(folder: Path, made_by: str) -> None:
    """Writes the marker of a finished folder."""
    files = {name: size_and_time for name, size_and_time in _entries(folder) if name != MARKER}
    (folder / MARKER).write_text(json.dumps({"made_by": made_by, "files": files}, indent=1) + "\n", encoding="ascii")


def _put_in_place(scratch: Path, target: Path) -> None:
    """Renames; a process that is killed in between leaves both folders, under hidden names."""
    if not target.exists():
        scratch.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(old / "old")
    try:
        scratch.rename(target)
    except OSError:
        (old / "old").rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _not_replaceable(target: Path, made_by: str) -> str | None:
    """What is there and is not an earlier product of the command, in words; None if there is nothing else."""
    if not os.path.lexists(target):
        return None
    if not target.is_dir():
        return "is a file"
    if not any(target.iterdir()):
        return None
    try:
        marker = read_json(target / MARKER)
    except ValueError:
        marker = None
    files = marker.get("files") if isinstance(marker, dict) and marker.get("made_by") == made_by else None
    if not isinstance(files, dict):
        return f"exists and was not written by {made_by}"
    for name, size_and_time in _entries(target):
        if name == MARKER:
            continue
        if name not in files:
            return f"holds {name!a}, which {made_by} did not write"
        if files[name] != size_and_time:
            return f"holds {name!a}, which was changed after {made_by} wrote it"
    return None


def _entries(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Every file below a folder with its size and time, and every link and empty folder with none, in a fixed order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            # What importing the folder's code leaves there is nobody's.
            if path.name == "__pycache__" and all(entry.suffix == ".pyc" for entry in path.iterdir()):
                continue
            below = [(f"{path.name}/{name}", found) for name, found in _entries(path)]
            yield from below or [(f"{path.name}/", [])]
        elif path.is_file() and not path.is_symlink():
            status = path.stat()
            yield path.name, [status.st_size, status.st_mtime_ns]
        else:
            yield path.name, []


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
