"""Samples read out of tar files that come from somewhere else.

Members are walked header by header, and every size is checked against the file before anything is read. Python's own
reader follows links, fills up sparse members of any size, and takes minutes for some headers of a few megabytes.
"""

from __future__ import annotations

import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hybridprune_megatron.config.json_text import is_plain
from hybridprune_megatron.config.stores import AnyPath, StoreFile

#: Bytes of the parts of a sample that are read.
MOST_SAMPLE_BYTES = 2**32
#: Members of a sample, and headers that only name the member after them.
_MOST_MEMBERS = 10_000
_MOST_HEADERS = 10
_MOST_NAME_BYTES = 65_536
#: Characters of a key; log lines show it.
_MOST_KEY = 500
_INDEX = ".tar.idx"
_BLOCK = tarfile.BLOCKSIZE
_OFFSET = struct.Struct("<Q")
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
#: Types whose size field says nothing about what follows.
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class _Member(NamedTuple):
    """A member of a tar file, and where in the file its headers and its content lie."""

    name: str
    kind: bytes
    start: int
    offset: int
    size: int


class Place(NamedTuple):
    """Where in a tar file a sample lies, and offset and size of its parts by their names."""

    key: str
    start: int
    end: int
    parts: dict[str, tuple[int, int]]


class Shard:
    """A tar file and the index that Energon wrote of it, opened for reading.

    Args:
        path: of the tar file.

    Raises:
        OSError: one of the two cannot be opened.
        StoreError: their store cannot be read.
    """

    def __init__(self, path: AnyPath) -> None:
        self._tar = path.open("rb")
        try:
            self._index = path.with_suffix(_INDEX).open("rb")
        except OSError:
            self._tar.close()
            raise

    def __len__(self) -> int:
        return max(0, _size(self._index) // _OFFSET.size - 1)

    def sample(self, number: int, wanted: Callable[[str], object]) -> tuple[str, dict[str, bytes]]:
        """Key and parts of a sample.

        Args:
            number: of the sample, from 0.
            wanted: says which parts, by their name, are read.

        Raises:
            ValueError: the index does not have it, or what lies there is not one sample of plain files.
            OSError: the files cannot be read.
            StoreError: their store cannot be read.
        """
        self._index.seek(number * _OFFSET.size)
        content = self._index.read(2 * _OFFSET.size)
        if len(content) < 2 * _OFFSET.size:
            raise ValueError(f"its index ends after {len(self)} samples")
        (start,), (end,) = _OFFSET.iter_unpack(content)
        samples = list(read_samples(self._tar, start, end, wanted))
        if len(samples) != 1:
            raise ValueError(f"{len(samples)} samples where its index names one")
        return samples[0]

    def close(self) -> None:
        """Closes both files."""
        self._tar.close()
        self._index.close()


def index_path(shard: Path) -> Path:
    """The index of a shard."""
    return shard.with_suffix(_INDEX)


def write_index(shard: Path) -> list[Place]:
    """Writes the index of a shard, and returns what is in it.

    Raises:
        ValueError: the shard is not a row of samples.
    """
    places: list[Place] = []
    with shard.open("rb") as file:
        for member in _members(file, 0, shard.stat().st_size):
            key, part = _key_and_part(member.name)
            if not key or member.kind not in _REGULAR:
                continue
            if not places or key != places[-1].key:
                places.append(Place(key, member.start, 0, {}))
            end = member.offset + -(-member.size // _BLOCK) * _BLOCK
            places[-1] = places[-1]._replace(end=end)
            places[-1].parts[part] = (member.offset, member.size)
    offsets = [place.start for place in places] + [place.end for place in places[-1:]]
    index_path(shard).write_bytes(b"".join(map(_OFFSET.pack, offsets)))
    return places


def read_samples(
    file: BinaryIO, start: int, end: int, wanted: Callable[[str], object]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and parts of the samples between two offsets of a tar file, one sample in memory at a time.

    Args:
        file: opened for reading.
        start: offset of the first header.
        end: offset after the last member.
        wanted: says which parts, by their name, are read.

    Raises:
        ValueError: what lies there is not a row of samples of plain files.
    """
    size = _size(file)
    if not 0 <= start < end <= size:
        raise ValueError(f"bytes {start} to {end} of a file of {size}")
    key, parts, members, left = "", dict[str, bytes](), 0, MOST_SAMPLE_BYTES
    for member in _members(file, start, end):
        this, part = _key_and_part(member.name)
        if not this or (member.kind not in _REGULAR and not (this == key and wanted(part))):
            continue
        if this != key:
            if key:
                yield key, parts
            key, parts, members, left = this, {}, 0, MOST_SAMPLE_BYTES
        members += 1
        left -= member.size if wanted(part) else 0
        _check_member(member, key, members, left)
        if wanted(part):
            file.seek(member.offset)
            parts[part] = file.read(member.size)
    if key:
        yield key, parts


def _size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    raw = getattr(file, "raw", None)
    return raw.size if isinstance(raw, StoreFile) else os.fstat(file.fileno()).st_size


def _key_and_part(name: str) -> tuple[str, str]:
    """The key of the sample that a member belongs to, "" if to none, and the part that it is."""
    folder, slash, file = name.rpartition("/")
    stem, dot, part = file.partition(".")
    first = name.partition("/")[0]
    # Energon keeps folders of such names for itself. Other folders belong to the key, and may hold dots.
    reserved = first[:2] == first[-2:] == "__"
    return (folder + slash + stem, part) if stem and dot and not reserved else ("", "")


def _check_member(member: _Member, key: str, members: int, left: int) -> None:
    """Refuses a member that a sample must not have."""
    if len(key) > _MOST_KEY or not is_plain(key):
        raise ValueError(f"a key of {len(key)} characters, {key[:40]!a}")
    if member.kind not in _REGULAR:
        raise ValueError(f"its member {member.name[:100]!a} is a link, a device or sparse, not a plain file")
    if left < 0 or members > _MOST_MEMBERS:
        raise ValueError(f"sample {key} has more than {_MOST_MEMBERS} members or {MOST_SAMPLE_BYTES} bytes")


def _members(file: BinaryIO, start: int, end: int) -> Iterator[_Member]:
    """The members from one offset to another.

    Raises:
        ValueError: a header is broken, or says more than there is.
    """
    name, headers, position = "", 0, start
    while position < end:
        start = start if headers else position
        file.seek(position)
        block = file.read(min(_BLOCK, end - position))
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"no member at byte {position} ({error})") from None
        position += _BLOCK
        size = 0 if info.type in _EMPTY else info.size
        if not 0 <= size <= end - position:
            raise ValueError(f"a member of {size} bytes where {end - position} are left")
        if info.type not in _HEADERS:
            yield _Member(name or info.name, info.type, start, position, size)
            name, headers = "", 0
        else:
            headers += 1
            if size > _MOST_NAME_BYTES or headers > _MOST_HEADERS:
                raise ValueError(f"{headers} headers before a member, one of {size} bytes")
            file.seek(position)
            name = _long_name(file.read(size), info.type) or name
        position += -(-size // _BLOCK) * _BLOCK


def _long_name(content: bytes, kind: bytes) -> str:
    """What a header says about the name of the member after it, "" if nothing."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    name = ""
    while kind in _PAX and content:
        length, space, _ = content[:20].partition(b" ")
        if not length.isdigit() or not space or not len(length) + 1 < int(length) <= len(content):
            break
        field, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if field == b"size" or field.startswith(b"GNU.sparse"):
            raise ValueError(f"a member with {field.decode('ascii')} in its header: it is sparse, or above 8 GiB")
        if field == b"path":
            name = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return name
