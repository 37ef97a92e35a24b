"""Checked data sets as Energon's objects, built here: Energon's own way calls what a data set's files name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.energon import CrudeWebdataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import DataSet


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
                EPath(each.folder),
                split_part=each.part,
                training=training,
                worker_config=worker_config,
                decoder=None,
                **settings,
            )
            found = [(shard.name, shard.count, str(shard.path)) for shard in factory.shards]
        except Exception as error:
            # Energon has parsers of its own, and errors of any kind for what they cannot read.
            raise ConfigError(f"{each.folder}: Energon cannot read it ({' '.join(str(error).split()):.300})") from None
        checked = [(name, count, str(each.folder / name)) for name, count in each.shards]
        if found != checked or factory.sample_excludes != each.excluded:
            raise ConfigError(f"{each.folder}: Energon reads other shards out of its split.yaml: write it again")
        loaded.append(LoadedDataset(dataset=factory, weight=each.weight))
    return loaded


def blend_mode(sets: Sequence[DataSet]) -> DatasetBlendMode:
    """How Energon draws from data sets: by their weights, if they have any."""
    return DatasetBlendMode.NONE if sets[0].weight is None else DatasetBlendMode.DATASET_WEIGHT
