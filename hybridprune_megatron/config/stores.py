"""Data sets in an object store: ``s3://bucket/path`` and ``msc://profile/path``.

Where a store is and who may read it never stands in our configuration. For ``s3://`` botocore finds both as the AWS
tools do (environment, ``~/.aws``, the machine's role); for ``msc://`` the file of multi-storage-client says it. Stores
are only read. Clients belong to a process: a loader process makes its own.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.json_text import is_plain

#: What a path may start with, before ``://``.
SCHEMES = ("s3", "msc")
#: Objects below a data set's folder.
_MOST_OBJECTS = 10**6
#: Bytes that one request brings at least, if there are so many: headers of members come with what follows them.
_READ_AHEAD = 2**20
_CONNECT_SECONDS = 5
#: Seconds for an answer and attempts, where a person waits and where a run must outlive a bad minute.
_QUICK, _PATIENT = (10, 2), (60, 10)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with ~/.aws/credentials"
_DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ABSENT = {"404", "NoSuchKey"}


class StoreError(Exception):
    """A store that cannot be read as a whole. The message is a single line with the fix."""


@dataclass(frozen=True)
class StorePath:
    """A path in a store, with as much of ``pathlib.Path`` as reading a data set needs.

    Every method that asks the store raises ``StoreError`` where the store refuses or does not answer.

    Attributes:
        scheme: one of ``SCHEMES``.
        bucket: of the store; the profile for ``msc``.
        key: without slashes at its ends; "" is the bucket itself.
        sizes: bytes of all objects below a folder by their keys, once it is ``listed``.
    """

    scheme: str
    bucket: str
    key: str
    sizes: Mapping[str, int] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> StorePath:
        """A path below the bucket.

        Raises:
            ValueError: the name leads out of it.
        """
        key = posixpath.normpath(posixpath.join(self.key, name))
        if name.startswith("/") or key.split("/")[0] == "..":
            raise ValueError(f"{name:.200} leads out of {self}: give a path in {self.scheme}://{self.bucket}")
        return replace(self, key="" if key == "." else key)

    @property
    def name(self) -> str:
        """The last step."""
        return posixpath.basename(self.key)

    @property
    def parent(self) -> StorePath:
        """The folder that it lies in."""
        return replace(self, key=posixpath.dirname(self.key))

    def with_suffix(self, suffix: str) -> StorePath:
        """The same with another ending."""
        return replace(self, key=str(PurePosixPath(self.key).with_suffix(suffix)))

    def listed(self) -> StorePath:
        """The folder with the sizes of what lies below it, which its paths then need not ask for.

        Raises:
            StoreError: also where nothing lies there.
        """
        prefix = f"{self.key}/" if self.key else ""
        sizes = self._store.sizes(prefix)
        if not sizes:
            raise StoreError(f"nothing lies in {self}: copy a data set there, or correct the path")
        return replace(self, sizes=sizes)

    def exists(self) -> bool:
        """Whether there is such an object; folders are none."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def size(self, patience: tuple[int, int] = _QUICK) -> int:
        """Bytes.

        Args:
            patience: seconds for an answer, and attempts.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if self.sizes is None:
            return self._store.size(self.key, patience)
        if self.key not in self.sizes:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return self.sizes[self.key]

    def read_bytes(self) -> bytes:
        """All of it.

        Raises:
            FileNotFoundError: there is no such object.
        """
        size = self.size()
        return self._store.read(self.key, 0, size, _QUICK) if size else b""

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it as text.

        Raises:
            FileNotFoundError, ValueError: there is no such object, or it is not text.
        """
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """A file that asks the store for what is read of it, patiently.

        Raises:
            FileNotFoundError: there is no such object.
        """
        assert mode == "rb", f"mode {mode}: stores are only read"
        return cast(BinaryIO, io.BufferedReader(StoreFile(self, self.size(_PATIENT)), _READ_AHEAD))

    def read_range(self, start: int, size: int) -> bytes:
        """Some bytes of it, at least one, patiently."""
        return self._store.read(self.key, start, size, _PATIENT)

    @property
    def _store(self) -> _S3 | _Msc:
        return _S3(self.bucket) if self.scheme == "s3" else _Msc(self.bucket)


AnyPath = Path | StorePath


class StoreFile(io.RawIOBase):
    """An object, read range by range.

    Args:
        path: of the object.
        size: its bytes.
    """

    def __init__(self, path: StorePath, size: int) -> None:
        super().__init__()
        self._path, self.size, self._position = path, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to an offset from the start, from here, or from the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the object goes."""
        wanted = min(len(buffer), self.size - self._position)
        if wanted <= 0:
            return 0
        content = self._path.read_range(self._position, wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def located(path: str | AnyPath, key: str) -> AnyPath:
    """A path of the command line: a local one, or one in a store.

    Args:
        key: what sets it, for errors.

    Raises:
        ConfigError: an address of another kind, or one without a bucket.
    """
    match = _ADDRESS.fullmatch(path) if isinstance(path, str) else None
    if match is None:
        return Path(path) if isinstance(path, str) else path
    scheme, rest = match.groups()
    bucket, _, name = rest.partition("/")
    fix = "give a folder, s3://bucket/path or msc://profile/path"
    if scheme not in SCHEMES:
        raise fail(key, path, "is in no store that is read", fix)
    steps = [step for step in name.split("/") if step]
    if not _BUCKET.fullmatch(bucket) or not is_plain(name) or {".", ".."} & {*steps} or re.search(r"[\\?#]", name):
        raise fail(key, path, "is not a bucket or profile and a plain path", fix)
    return StorePath(scheme, bucket, "/".join(steps))


def local(path: AnyPath, key: str) -> Path:
    """A path that must not be in a store.

    Args:
        key: what sets it, for errors.

    Raises:
        ConfigError: it is in one.
    """
    if isinstance(path, StorePath):
        raise fail(key, str(path), "is in a store, which only a finetuning run reads", f"give {key}=<local folder>")
    return path


class _S3:
    """A bucket, through botocore, which s3fs brings."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes by key of all objects whose keys start so."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            page = self._ask(_QUICK, "list_objects_v2", Prefix=prefix, **more)
            found |= {each["Key"]: each["Size"] for each in page.get("Contents", [])}
            if len(found) > _MOST_OBJECTS:
                raise StoreError(
                    f"more than {_MOST_OBJECTS} objects in s3://{self._bucket}/{prefix}: give one data set"
                )
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, key: str, patience: tuple[int, int]) -> int:
        """Bytes of an object."""
        return int(self._ask(patience, "head_object", Key=key)["ContentLength"]) if key else self._absent(key)

    def read(self, key: str, start: int, size: int, patience: tuple[int, int]) -> bytes:
        """Some bytes of an object."""
        answer = self._ask(patience, "get_object", Key=key, Range=f"bytes={start}-{start + size - 1}")
        return bytes(answer["Body"])

    def _absent(self, key: str) -> int:
        raise FileNotFoundError(errno.ENOENT, "no such object", f"s3://{self._bucket}/{key}")

    def _ask(self, patience: tuple[int, int], what: str, **arguments: Any) -> dict[str, Any]:
        """An answer of the store, its body read."""
        from botocore import exceptions  # type: ignore[import-untyped]  # the package ships no types

        where = f"s3://{self._bucket}"
        try:
            client = _s3_client(os.getpid(), *patience)
            answer: dict[str, Any] = getattr(client, what)(Bucket=self._bucket, **arguments)
            if "Body" in answer:
                answer["Body"] = answer["Body"].read()
            return answer
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _ABSENT and "Key" in arguments:
                self._absent(arguments["Key"])
            if code == "NoSuchBucket":
                raise StoreError(f"there is no bucket {self._bucket}: correct it, or AWS_ENDPOINT_URL") from error
            if code in _DENIED:
                raise StoreError(
                    f"{where} refuses these credentials ({code}): {_CREDENTIALS} of who may read"
                ) from error
            raise StoreError(
                f"{where} cannot be read ({_line(error)}): try again, or check AWS_ENDPOINT_URL"
            ) from error
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise StoreError(f"no credentials for {where}: {_CREDENTIALS}") from error
        # A bad answer, a broken connection, a profile that is not there: all are BotoCoreErrors, or ValueErrors.
        except (exceptions.BotoCoreError, exceptions.HTTPClientError, ValueError) as error:
            fix = "check AWS_ENDPOINT_URL, AWS_PROFILE and the network"
            raise StoreError(f"{where} cannot be reached ({_line(error)}): {fix}") from error


@lru_cache(maxsize=4)
def _s3_client(process: int, read_seconds: int, attempts: int) -> Any:
    """A client of a process, which is a part of the key: connections do not survive a fork."""
    import botocore.session  # type: ignore[import-untyped]  # the package ships no types
    from botocore.config import Config  # type: ignore[import-untyped]  # the package ships no types

    retries = {"mode": "standard", "total_max_attempts": attempts}
    settings = Config(connect_timeout=_CONNECT_SECONDS, read_timeout=read_seconds, retries=retries)
    return botocore.session.get_session().create_client("s3", config=settings)


class _Msc:
    """A profile of multi-storage-client."""

    def __init__(self, profile: str) -> None:
        self._profile = profile

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes by key of all objects whose keys start so."""
        found: dict[str, int] = {}

        def collect(client: Any) -> None:
            for each in client.list_recursive(path=prefix):
                found[each.key.lstrip("/")] = each.content_length
                if len(found) > _MOST_OBJECTS:
                    where = f"msc://{self._profile}/{prefix}"
                    raise StoreError(f"more than {_MOST_OBJECTS} objects in {where}: give one data set")

        self._ask(collect, prefix)
        return found

    def size(self, key: str, _: tuple[int, int]) -> int:
        """Bytes of an object; how long is waited is the profile's affair."""
        found = self._ask(lambda client: client.info(key), key)
        if found.type != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object", f"msc://{self._profile}/{key}")
        return int(found.content_length)

    def read(self, key: str, start: int, size: int, _: tuple[int, int]) -> bytes:
        """Some bytes of an object; as ``size``."""
        from multistorageclient.types import Range

        return bytes(self._ask(lambda client: client.read(key, byte_range=Range(start, size)), key))

    def _ask(self, what: Callable[[Any], Any], key: str) -> Any:
        where = f"msc://{self._profile}"
        try:
            import multistorageclient

            # It writes a page about packages that are missing; the line below says it.
            logging.getLogger("multistorageclient").setLevel(logging.CRITICAL)
            client, _ = multistorageclient.resolve_storage_client(where)
            return what(client)
        except StoreError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{where}/{key}") from None
        except ImportError as error:
            fix = f"pip install {error.name or 'it'}"
            raise StoreError(f"{where} needs a package that is not installed ({_line(error)}): {fix}") from error
        # Each of its stores has errors of its own.
        except Exception as error:
            fix = "check the profile in the file that MSC_CONFIG names, its credentials and the network"
            raise StoreError(f"{where} cannot be read ({_line(error)}): {fix}") from error


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
