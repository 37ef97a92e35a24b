"""Checked data sets as Energon's objects, built here: Energon's own way calls what a data set's files name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.energon import CrudeWebdataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import DataSet
from hybridprune_megatron.config.stores import AnyPath, StoreError, StorePath, located

#: Stands for ``s3://`` where Energon has the name of a profile, which cannot be called so.
_S3 = "s3:"


def energon_sets(
    sets: Sequence[DataSet], training: bool, worker_config: WorkerConfig, **settings: Any
) -> list[LoadedDataset]:
    """The data sets for a task encoder of crude samples, whose parts stay bytes.

    Args:
        sets: from ``read_data_sets``.
        training: whether samples are shuffled and repeated.
        worker_config: who reads them.
        settings: of ``CrudeWebdataset``.

    Raises:
        ConfigError: Energon reads something else out of a data set's files than was checked.
    """
    loaded = []
    for each in sets:
        try:
            factory = CrudeWebdataset(
                energon_path(each.folder),
                split_part=each.part,
                training=training,
                worker_config=worker_config,
                decoder=None,
                **settings,
            )
            found = [(shard.name, shard.count, str(plain_path(shard.path))) for shard in factory.shards]
        except StoreError as error:
            raise ConfigError(f"{each.folder}: {error}") from error
        except Exception as error:
            # Energon has parsers of its own, and errors of any kind for what they cannot read.
            raise ConfigError(f"{each.folder}: Energon cannot read it ({' '.join(str(error).split()):.300})") from None
        checked = [(name, count, str(each.folder / name)) for name, count in each.shards]
        if found != checked or factory.sample_excludes != each.excluded:
            raise ConfigError(f"{each.folder}: Energon reads other shards out of its split.yaml: write it again")
        loaded.append(LoadedDataset(dataset=factory, weight=each.weight))
    return loaded


def energon_path(path: AnyPath) -> EPath:
    """A path as Energon has it; it reads only descriptions through it."""
    if isinstance(path, Path):
        return EPath(path)
    return _S3Path(path) if path.scheme == "s3" else EPath(str(path))


def plain_path(path: EPath) -> AnyPath:
    """The reverse of ``energon_path``."""
    return located(str(path), "data") if path.profile != _S3 else _object(str(path.internal_path))


def _object(path: str) -> StorePath:
    """What ``/bucket/key`` names."""
    bucket, _, key = path.lstrip("/").partition("/")
    return StorePath("s3", bucket, key)


class _S3Path(EPath):
    """An ``s3://`` path. Energon's own, by multi-storage-client, needs boto3; this one needs what is installed."""

    def __init__(self, path: StorePath) -> None:
        self.internal_path, self.profile = PurePosixPath(f"/{path.bucket}/{path.key}"), _S3
        self.fs = _S3Descriptions()

    def __reduce__(self) -> tuple[type[_S3Path], tuple[AnyPath]]:
        # Samples say which data set they come from, and loader processes send samples.
        return _S3Path, (plain_path(self),)


class _S3Descriptions:
    """What Energon calls of a client of multi-storage-client when it reads descriptions."""

    def open(self, path: str, mode: str = "r", prefetch_file: bool = False) -> Any:
        """An object, read whole: descriptions are small, and were checked to be."""
        content = _object(path).read_bytes()
        return io.BytesIO(content) if "b" in mode else io.StringIO(content.decode())

    def is_file(self, path: str) -> bool:
        """Whether there is such an object."""
        return _object(path).is_file()

    def get_posix_path(self, path: str) -> None:
        """Nothing here is a local file."""


def blend_mode(sets: Sequence[DataSet]) -> DatasetBlendMode:
    """How Energon draws from data sets: by their weights, if they have any."""
    return DatasetBlendMode.NONE if sets[0].weight is None else DatasetBlendMode.DATASET_WEIGHT
