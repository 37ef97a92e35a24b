"""All samples of a data set once, in order, through the stages that training reads them by."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.energon.errors import FatalSampleError

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import Config
from hybridprune_megatron.config.data_sets import features_of
from hybridprune_megatron.data.bad_samples import count_broken_shards, fatal_line
from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.energon_sets import energon_sets
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.task_encoder import VideoTaskEncoder, _data_sets, _savable_loader, _worker_config


def build_eval_loader(cfg: Config, rank: int = 0, world_size: int = 1) -> Iterator[EncodedSample]:
    """The samples of ``data.validation``, once, in the order of their shards; ranks share them.

    Raises:
        ValueError: as iterating a ``TrainLoader`` does.
    """
    sets = _data_sets(cfg.data.validation, "data.validation", "val")
    features = features_of(sets, f"data.validation={cfg.data.validation}")
    task_encoder = VideoTaskEncoder(SampleEncoder(cfg), cfg.data.max_bad_share, features=features)
    worker_config = _worker_config(rank, world_size, 0, cfg.trainer.seed)
    dataset = task_encoder.build_val_datasets(
        datasets=energon_sets(sets, False, worker_config), worker_config=worker_config, batch_size=None
    )
    count_broken_shards(dataset, task_encoder.tally)
    try:
        for finished in _savable_loader(dataset):
            yield finished.sample
    except FatalSampleError as error:
        raise ConfigError(fatal_line(error)) from None
