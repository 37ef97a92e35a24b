"""Files that a foreign folder names: only those that lie in it are read or copied."""

from __future__ import annotations

from pathlib import Path


def file_inside(folder: Path, name: object) -> Path:
    """The path of a folder's file, which need not be there.

    A link counts as where it ends: in the folder, or, as in the Hugging Face cache, in the ``blobs`` folder next to
    ``snapshots`` that the folder is a snapshot of.

    Args:
        folder: the user named it, so it may be a link itself.
        name: from the folder's own files.

    Returns:
        ``folder / name``.

    Raises:
        ValueError: the name is not that of a file of this folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
        raise ValueError(
            f"{folder} names the file {name!r:.120}: only names of files in the folder itself are followed"
        )
    path = folder / name
    try:
        root, end = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{path} is a link that leads nowhere: put the file itself in its place") from None
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not (end.is_relative_to(root) or end.is_relative_to(blobs)):
        raise ValueError(f"{path} is a link to {end}, outside of the folder: put the file itself in its place")
    return path
