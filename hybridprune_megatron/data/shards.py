"""Data sets on disk: WebDataset tar shards with conversations, videos and images, prepared for Energon.

A sample with key K is ``K.json`` ({"conversation": messages, "meta": anything}) and its videos and images, ``K.mp4``
or, where there are several, ``K.0.mp4``, ``K.1.png`` in the order of their placeholders. A part
``safetensors`` in the place of ``mp4`` holds features of the video's frames (``data.features``).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml  # type: ignore[import-untyped]  # the package ships no types
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.indexing import DuplicateSampleKeyError, SqliteIndexWriter
from megatron.energon.flavors.webdataset.prepare import IndexSample, IndexSamplePart

from hybridprune_megatron.data.features import FEATURES_EXTENSION, StoredFeatures
from hybridprune_megatron.data.stored_media import IMAGE_EXTENSIONS, StoredMedium, stored
from hybridprune_megatron.data.tar_samples import Place, Shard, index_path, read_samples, write_index

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "gif")
#: Types of files that samples show.
MEDIA_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
CONVERSATION_PART = "json"
_VIDEO_PART = re.compile(r"(?:([0-9]{1,6})\.)?(" + "|".join((*MEDIA_EXTENSIONS, FEATURES_EXTENSION)) + ")")


class ShardWriter:
    """Writes one data set folder; it appears under its name only when it is complete.

    Use as a context manager. Samples go to a folder beside the target, which is renamed at the end; after an exception
    that folder is removed.

    Args:
        folder: the data set's folder.
        split: Energon split part that all shards belong to (``train`` or ``val``).
        samples_per_shard: samples in a tar file.
        replace: whether an existing folder is replaced.

    Raises:
        ValueError: the folder exists and ``replace`` is not set, or a shard would hold no sample.
    """

    def __init__(self, folder: Path, split: str, samples_per_shard: int = 500, replace: bool = False) -> None:
        if folder.exists() and not replace:
            raise ValueError(f"{folder} exists: choose another folder, or remove it first")
        if samples_per_shard < 1:
            raise ValueError(f"{samples_per_shard} samples in a shard: at least 1")
        self.folder = folder
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        # Made when the writing begins; nobody else's folder has its name.
        self._partial = folder
        self._tar: tarfile.TarFile | None = None
        self._names: list[str] = []
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(
            tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".partial", dir=self.folder.parent)
        )
        self._partial.chmod(0o755)
        return self

    def add(
        self,
        key: str,
        conversation: Sequence[dict[str, Any]],
        videos: Sequence[tuple[str, bytes]],
        meta: dict[str, Any] | None = None,
    ) -> None:
        """Writes a sample.

        Args:
            key: unique name; letters, digits, dash and underscore.
            videos: extension and bytes of each video or image.
            meta: whatever an evaluation needs.

        Raises:
            ValueError: the key is malformed or repeated, or an extension is unknown.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key) or key in self._keys:
            raise ValueError(f"sample key {key!r}: letters, digits, dash and underscore, each key once")
        for extension, _ in videos:
            if extension not in MEDIA_EXTENSIONS:
                raise ValueError(f"video of type {extension!r}: choose one of {', '.join(MEDIA_EXTENSIONS)}")
        content = json.dumps({"conversation": list(conversation), "meta": meta or {}}, ensure_ascii=False).encode()
        if self._tar is None or self.num_samples % self.samples_per_shard == 0:
            self._next_shard()
        self._keys.add(key)
        self._write(f"{key}.{CONVERSATION_PART}", content)
        for index, (extension, data) in enumerate(videos):
            part = extension if len(videos) == 1 else f"{index}.{extension}"
            self._write(f"{key}.{part}", data)
        self.num_samples += 1

    def add_file(self, name: str, content: Any) -> None:
        """Writes a JSON file about the data set beside its shards."""
        (self._partial / name).write_text(json.dumps(content, indent=2) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()
        if error is not None:
            shutil.rmtree(self._partial)
            return
        if not self._names:
            shutil.rmtree(self._partial)
            raise ValueError(f"no sample for {self.folder}: nothing was written")
        prepare_dataset(self._partial, self._names, self.split)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._partial.rename(self.folder)

    def _next_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
        name = f"shard-{len(self._names):05d}.tar"
        self._names.append(name)
        # Stays open over many calls of add; __exit__ closes it.
        self._tar = tarfile.open(self._partial / name, "w")  # noqa: SIM115

    def _write(self, name: str, data: bytes) -> None:
        assert self._tar is not None, "no shard is open"
        _add_member(self._tar, name, data)


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes one tar file, whole or not at all.

    Args:
        path: the file; its folder is made.
        members: names and contents, in order; the parts of a sample follow one another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for name, data in members:
            _add_member(tar, name, data)
    partial.replace(path)


def read_shard(
    path: Path, left_out: Callable[[str], object] = logger.warning
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and parts of the samples of a tar file, one sample in memory at a time.

    Args:
        path: the file; its index says where samples begin, so that one that cannot be read is left out alone.
        left_out: is told what cannot be read.
    """
    if not index_path(path).is_file():
        with path.open("rb") as file:
            try:
                yield from read_samples(file, 0, path.stat().st_size, bool)
            except ValueError as error:
                left_out(f"{path}: the rest cannot be read ({error})")
        return
    shard = Shard(path)
    with contextlib.closing(shard):
        for number in range(len(shard)):
            try:
                sample = shard.sample(number, bool)
            except ValueError as error:
                left_out(f"{path}: sample number {number} cannot be read ({error})")
            else:
                yield sample


def is_sample_part(part: str) -> bool:
    """Whether training reads a part: the conversation, a video, an image or features."""
    return part == CONVERSATION_PART or _VIDEO_PART.fullmatch(part) is not None


def video_parts(parts: Iterable[str]) -> list[str]:
    """The parts of a sample that are videos, images or features, in the order of their placeholders."""
    found = [(int(match[1] or 0), part) for part in parts if (match := _VIDEO_PART.fullmatch(part))]
    return [part for _, part in sorted(found)]


def stored_videos(parts: Mapping[str, Any]) -> tuple[StoredMedium, ...]:
    """The videos of a sample, or their features, and its images, in the order of their placeholders."""
    return tuple(
        StoredFeatures(parts[part])
        if part.endswith(FEATURES_EXTENSION)
        else stored(part.rpartition(".")[2], parts[part])
        for part in video_parts(parts)
    )


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A fresh TarInfo has no time and no owner, so that equal samples give equal shards.
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def prepare_dataset(folder: Path, shard_names: Iterable[str], split: str) -> None:
    """Writes Energon's description of a folder of shards and their indices, as ``energon prepare`` would.

    Energon's own way forks, which a process that has decoded videos must not do: the child may wait for ever.

    Raises:
        ValueError: two samples share a key, or a shard has none.
    """
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    counts = {}
    with SqliteIndexWriter(EPath(meta / "index.sqlite")) as index:
        for shard, name in enumerate(shard_names):
            places = write_index(folder / name)
            if not places:
                raise ValueError(f"{folder / name} has no samples")
            counts[name] = len(places)
            try:
                _index_samples(index, shard, places)
            except DuplicateSampleKeyError as error:
                raise ValueError(f"{folder / name}: two samples have the key {error.sample_key}") from None
    info = {"energon_version": version("megatron-energon"), "shard_counts": counts}
    (meta / ".info.json").write_text(json.dumps(info, indent=2))
    parts = {part: list(counts) if part == split else [] for part in ("train", "val", "test")}
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": parts, "exclude": []}, sort_keys=False))
    (meta / "index.uuid").write_text(str(uuid.uuid4()))
    # Crude: samples are passed on as bytes, and our task encoder makes sense of them.
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def _index_samples(index: SqliteIndexWriter, shard: int, places: Sequence[Place]) -> None:
    """Writes where the samples of a shard and their parts lie."""
    samples, parts = [], []
    for number, place in enumerate(places):
        where = {"tar_file_id": shard, "sample_index": number}
        span = {"byte_offset": place.start, "byte_size": place.end - place.start}
        samples.append(IndexSample(**where, **span, sample_key=place.key))
        for part, (offset, size) in place.parts.items():
            content = {"content_byte_offset": offset, "content_byte_size": size}
            parts.append(IndexSamplePart(**where, **content, part_name=part))
    index.append_samples(samples)
    index.append_parts(parts)
