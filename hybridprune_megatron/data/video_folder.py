"""The videos and images that rows name, as files below one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from hybridprune_megatron.config.json_text import is_plain, short
from hybridprune_megatron.data.images import read_image, to_tiles
from hybridprune_megatron.data.media import MIN_SIDE
from hybridprune_megatron.data.rows import BadRowError
from hybridprune_megatron.data.shards import MEDIA_EXTENSIONS, VIDEO_EXTENSIONS
from hybridprune_megatron.data.stored_media import kinds_of_names
from hybridprune_megatron.data.tar_samples import MOST_SAMPLE_BYTES
from hybridprune_megatron.data.video import check_video


class VideoFolder:
    """The videos and images that rows name, read from one folder; threads may share it.

    Args:
        folder: paths are relative to it.
        whole: videos are decoded to their ends, and images read, before they are taken.
    """

    def __init__(self, folder: Path, whole: bool = True) -> None:
        self._whole = whole
        self._folder = folder
        self._root = Path(os.path.realpath(folder))
        # Many rows ask about the same video, and a whole decode takes a while.
        self._checked: dict[Path, str | None] = {}
        self._checking: dict[Path, Lock] = {}

    def read(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        """Extensions and bytes of the videos and images of a row.

        Raises:
            BadRowError: one is not there or does not decode to its end, or training reads no sample of their size.
        """
        paths = [self._path(name) for name in names]
        size = sum(path.stat().st_size for path in paths)
        if size > MOST_SAMPLE_BYTES:
            raise BadRowError(
                "video", f"{size} bytes of videos: training reads at most {MOST_SAMPLE_BYTES} of a sample"
            )
        return [self._read(path, name) for path, name in zip(paths, names)]

    def _read(self, path: Path, name: str) -> tuple[str, bytes]:
        try:
            data = path.read_bytes()
        except (OSError, MemoryError) as error:
            raise BadRowError("video", f"{short(name)} cannot be read ({error})") from error
        # One thread decodes it, others that ask about the same video wait.
        with self._checking.setdefault(path, Lock()):
            if path not in self._checked:
                self._checked[path] = _why_not(data, name) if self._whole else None
        if self._checked[path] is not None:
            raise BadRowError("video", str(self._checked[path]))
        return path.suffix[1:].lower(), data

    def _path(self, name: str) -> Path:
        if not is_plain(name):
            raise BadRowError("video", f"{short(name)} is not the name of a file")
        path = Path(os.path.realpath(self._folder / name))
        # A row comes from somewhere else: it may only name files below the folder that the user gave.
        if not path.is_relative_to(self._root):
            raise BadRowError("video", f"{short(name)} is not below {self._folder}")
        if path.suffix[1:].lower() not in MEDIA_EXTENSIONS:
            raise BadRowError("video", f"{short(name)}: its type is none of {', '.join(MEDIA_EXTENSIONS)}")
        if not os.path.isfile(path):
            raise BadRowError("video", f"{short(name)} is not a file in {self._folder}")
        return path


def _why_not(data: bytes, name: str) -> str | None:
    """Why training cannot use a video or an image, None if it can."""
    try:
        if kinds_of_names([name]) == ["image"]:
            to_tiles(read_image(data, short(name)), MIN_SIDE, 1)
        else:
            check_video(data, short(name))
    except (ValueError, MemoryError) as error:
        return str(error)
    return None


def videos_below(folder: Path) -> list[str]:
    """Paths of all videos below a folder, relative to it and in order; hidden ones are none."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix[1:].lower() in VIDEO_EXTENSIONS)
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
