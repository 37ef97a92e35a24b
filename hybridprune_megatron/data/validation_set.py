"""The held-out samples that a run validates on: planned once, then read again at every validation.

Only where samples lie and how long they are is kept in between: the frames of some hundred videos fill too much memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import DataSet, features_of, read_data_sets
from hybridprune_megatron.config.stores import located
from hybridprune_megatron.data.batch import IGNORE_LABEL, PADDING_KEY, EncodedSample, PackedBatch, no_pixels, pack
from hybridprune_megatron.data.sample_encoder import BadSampleError, MisfitError, SampleDraft, SampleEncoder
from hybridprune_megatron.data.shards import is_sample_part
from hybridprune_megatron.data.stored_samples import StoredSample
from hybridprune_megatron.data.tar_samples import Shard
from hybridprune_megatron.data.task_encoder import check_kind, samples_by_pack
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Where an encoded sample comes from.

    Attributes:
        shard: tar file.
        number: of the stored sample in it, from 0.
        part: which of the samples that its conversation becomes (0 but with ``split_turns``).
        tokens: what it counts for in ``data.sequence_length``.
        answered: the data set says which answer is right.
    """

    shard: str
    number: int
    part: int
    tokens: int
    answered: bool


class ValidationSet:
    """The first ``trainer.eval_samples`` samples of ``data.validation`` that can be used, in packed sequences.

    A blend gives of each of its data sets as many as its weight says.

    Args:
        cfg: uses ``data``, ``model.vision``, ``trainer.eval_samples``, and what lengths must divide by
            (``length_multiple``).
    """

    def __init__(self, cfg: Config) -> None:
        assert cfg.data.validation is not None, "data.validation is not set"
        self._where = f"data.validation={cfg.data.validation}"
        self._sets = read_data_sets(cfg.data.validation, "val", "data.validation")
        self._features = features_of(self._sets, self._where)
        self._count = cfg.trainer.eval_samples
        self._encoder = SampleEncoder(cfg)
        self._multiple = cfg.length_multiple
        # As in training: padding must not push a full sequence over its length.
        self._capacity = cfg.data.sequence_length // self._multiple * self._multiple

    def plan(self) -> list[list[HeldOut]]:
        """The packed sequences, the same on every rank and under every layout of one ``length_multiple``.

        Raises:
            ConfigError: none of the samples can be used, or they hold features that do not fit the model.
        """
        found: list[HeldOut] = []
        for each, count in zip(self._sets, shares_of(self._sets, self._count)):
            for held_out in islice(self._usable(each), count):
                found += held_out
        if not found:
            raise ConfigError(f"{self._where}: none of its samples can be used; the log names them, or write it again")
        packs = samples_by_pack([sample.tokens for sample in found], self._capacity)
        return [[found[number] for number in each] for each in packs]

    def read(self, planned: Sequence[HeldOut]) -> tuple[PackedBatch | None, list[bool]]:
        """One packed sequence of the plan.

        Returns:
            The batch, on the host (None: none of its samples can be decoded), and which of the samples are in it.

        Raises:
            ValueError: a shard is not what it was when the plan was made.
        """
        samples = [self._decoded(sample) for sample in planned]
        usable = [sample for sample in samples if sample is not None]
        batch = pack(usable, self._multiple, self._encoder.pad_id) if usable else None
        return batch, [sample is not None for sample in samples]

    def filler(self) -> PackedBatch:
        """A short sequence of text for a rank that has to run along; no sample is in it."""
        ids = torch.full((self._multiple,), self._encoder.pad_id, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE_LABEL)
        # Losses of no tokens are nothing that kernels are tested for.
        labels[-1] = self._encoder.pad_id
        layout = SampleLayout((Span(TokenKind.TEXT, len(ids)),))
        return pack([EncodedSample(PADDING_KEY, ids, labels, layout, no_pixels())])

    def _usable(self, data: DataSet) -> Iterator[list[HeldOut]]:
        """What the stored samples of a data set become, one after another; those that cannot be used are named."""
        for name, _ in data.shards:
            path = data.folder / name
            try:
                shard = Shard(path)
            except OSError as error:
                logger.warning("left out: %s (%s)", path, error.strerror)
                continue
            with contextlib.closing(shard):
                for number in range(len(shard)):
                    try:
                        stored = StoredSample.of(*shard.sample(number, is_sample_part), path)
                        drafts = self._drafts(stored)
                    except MisfitError:
                        raise
                    except ValueError as error:
                        logger.warning("left out: sample number %d of %s: %s", number, path, error)
                        continue
                    if f"{name}/{stored.key}" in data.excluded:
                        continue
                    answered = stored.meta.get("answer") is not None
                    yield [
                        HeldOut(str(path), number, part, self._encoder.counted(draft.layout), answered)
                        for part, draft in enumerate(drafts)
                    ]

    def _drafts(self, stored: StoredSample) -> list[SampleDraft]:
        check_kind(stored.key, stored.videos, self._features)
        return self._encoder.draft(stored.key, stored.messages, stored.videos)

    def _decoded(self, planned: HeldOut) -> EncodedSample | None:
        path = located(planned.shard, "data.validation")
        try:
            with contextlib.closing(Shard(path)) as shard:
                stored = StoredSample.of(*shard.sample(planned.number, is_sample_part), path)
            draft = self._drafts(stored)[planned.part]
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{path} was changed while a run validates on it ({error}): leave it alone") from error
        try:
            return self._encoder.finish(draft)
        except BadSampleError as error:
            logger.warning("left out (%s): %s", error.reason, error)
            return None


def shares_of(sets: Sequence[DataSet], count: int) -> list[int]:
    """How many of ``count`` samples each data set of a blend gives; they add up."""
    ends, total = [0], 0.0
    for each in sets:
        total += 1.0 if each.weight is None else each.weight
        ends.append(round(count * total))
    return [end - start for start, end in pairwise(ends)]
