"""Reads data sets through Energon: its task encoder, packing, and loaders whose state can be saved.

Stages of Energon, in order: ``cook_sample`` (raw parts of a tar sample), ``preencode_sample`` (tokens),
``select_samples_to_pack``, ``postencode_sample`` (pixels, or features), ``pack_selected_samples``. Energon saves where
it is by remembering which samples its buffers hold, so every stage depends on nothing but its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    Sample,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    stateless,
)
from megatron.energon.errors import FatalSampleError, reraise_exception

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import DataSet, features_of, read_data_sets
from hybridprune_megatron.config.features import FeaturesInfo
from hybridprune_megatron.config.json_text import parse_json
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.bad_samples import BadSampleTally, changed_data, count_broken_shards, fatal, fatal_line
from hybridprune_megatron.data.batch import EncodedSample, PackedBatch, pack
from hybridprune_megatron.data.energon_sets import blend_mode, energon_sets
from hybridprune_megatron.data.features import StoredFeatures
from hybridprune_megatron.data.loader_state import from_plain, to_plain
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleDraft, SampleEncoder
from hybridprune_megatron.data.shards import CONVERSATION_PART, stored_videos
from hybridprune_megatron.data.stored_media import StoredMedium
from hybridprune_megatron.data.streams import streams_of
from hybridprune_megatron.data.worker_signals import obey_parent_only


def samples_by_pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit by falling length: full sequences leave less padding, and ranks less to wait for each other.

    Args:
        lengths: what the samples count for, in order of arrival, none above the capacity.
        capacity: of a packed sequence.

    Returns:
        Numbers of the samples of every pack, rising; packs in the order in which their first sample arrived.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sample]
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            packs.append([sample])
            room.append(capacity - length)
        else:
            packs[place].append(sample)
            room[place] -= length
    return sorted(sorted(pack) for pack in packs)


#: Samples in a row from one place of a shard before another place is read; the shuffle buffer mixes further.
_MAX_SAMPLES_PER_SEQUENCE = 100
#: Bytes of a conversation with what is known about it.
_MOST_CONVERSATION_BYTES = 2**24
#: A long video decodes for a while; Energon warns when a batch takes longer.
_SLOW_BATCH_SECONDS = 600


@edataclass
class RawSample(Sample):
    """Bytes of a tar sample: conversation, and videos or their features in order."""

    conversation: bytes
    videos: tuple[StoredMedium, ...]


@edataclass
class DraftSample(Sample):
    """A draft on its way to the packing."""

    draft: SampleDraft


@edataclass
class FinishedSample(Sample):
    """An encoded sample on its way to its pack."""

    sample: EncodedSample


@edataclass
class PackedSample(Sample):
    """A batch on its way out of the loader, with the counts of the process that made it."""

    batch: PackedBatch
    counts: dict[str, int]
    worker: int

    def pin_memory(self) -> PackedSample:
        """Pins what is copied to the device; Energon's own way, by recursion, would rebuild every span."""
        batch, features = self.batch, self.batch.frame_features
        if features is not None:
            features = replace(features, values=features.values.pin_memory())
        self.batch = replace(
            batch,
            input_ids=batch.input_ids.pin_memory(),
            labels=batch.labels.pin_memory(),
            loss_mask=batch.loss_mask.pin_memory(),
            pixel_values=batch.pixel_values.pin_memory(),
            frame_features=features,
        )
        return self


@stateless
def cook_sample(sample: dict[str, Any]) -> RawSample:
    """Takes the conversation and the videos out of a tar sample; other parts are never looked at."""
    return RawSample(
        **basic_sample_keys(sample), conversation=sample.get(CONVERSATION_PART, b""), videos=stored_videos(sample)
    )


class VideoTaskEncoder(TaskEncoder[RawSample, DraftSample, Any, PackedSample]):
    """Energon's stages over a ``SampleEncoder``.

    Args:
        encoder: makes tokens and pixels.
        max_bad_share: share of bad samples that is skipped before the job ends.
        pad_to_multiple_of: of the length of a packed sequence.
        features: what the data sets say about the features they hold in the place of videos, None if they hold videos.
    """

    # Parts are decoded here, from bytes. Energon's decoder would also unpickle parts with certain names.
    decoder = None
    cookers = (Cooker(cook_sample),)

    def __init__(
        self,
        encoder: SampleEncoder,
        max_bad_share: float,
        pad_to_multiple_of: int = 1,
        features: FeaturesInfo | None = None,
    ) -> None:
        self.encoder = encoder
        self.features = features
        self.pad_to_multiple_of = pad_to_multiple_of
        self.tally = BadSampleTally(max_bad_share)
        # Padding must not push a full sequence over its length.
        self.capacity = encoder.sequence_length // pad_to_multiple_of * pad_to_multiple_of

    @stateless
    def preencode_sample(self, sample: RawSample) -> Iterator[DraftSample]:
        """Tokens of a conversation; one draft, or one per turn."""
        self.tally.seen += 1
        try:
            check_kind(sample.__key__, sample.videos, self.features)
            drafts = self.encoder.draft(sample.__key__, _read_messages(sample), sample.videos)
        except BadSampleError as error:
            raise self.tally.skip(error) from error
        self.tally.shrunk += drafts[0].fitted.detail != self.encoder.full_detail
        for draft in drafts:
            yield DraftSample.derive_from(sample, draft=draft)

    def select_samples_to_pack(self, samples: list[DraftSample]) -> list[list[DraftSample]]:
        """See ``samples_by_pack``."""
        packs = samples_by_pack([self.encoder.counted(sample.draft.layout) for sample in samples], self.capacity)
        return [[samples[number] for number in pack] for pack in packs]

    @stateless
    def postencode_sample(self, sample: DraftSample) -> FinishedSample:
        """Decodes the videos of a sample that was chosen for a pack, or takes their features."""
        try:
            return FinishedSample.derive_from(sample, sample=self.encoder.finish(sample.draft))
        except BadSampleError as error:
            raise self.tally.skip(error) from error

    @stateless
    def pack_selected_samples(self, samples: list[FinishedSample]) -> PackedSample:
        """One packed sequence."""
        chosen: list[EncodedSample] = []
        room = self.capacity
        for each in samples:
            length = self.encoder.counted(each.sample.layout)
            if length > room:
                # Only a video whose index lied about its frames is longer than its draft.
                self._too_long(each.sample, room)
                continue
            chosen.append(each.sample)
            room -= length
        if not chosen:
            raise SkipSample
        try:
            batch = pack(chosen, self.pad_to_multiple_of, self.encoder.pad_id)
        except ValueError as error:
            raise fatal(str(error)) from error
        worker = WorkerConfig.active_worker_config.rank_worker_id() if WorkerConfig.active_worker_config else 0
        return PackedSample.derive_from(samples[0], batch=batch, counts=self.tally.snapshot(), worker=worker)

    def _too_long(self, sample: EncodedSample, room: int) -> None:
        message = f"{self.encoder.counted(sample.layout)} tokens after decoding, {room} left in its sequence"
        self.tally.skip(BadSampleError("too_long", sample.key, message))


class _Stream:
    """One of the ``num_streams`` streams of packed batches; for Energon, a rank of a job with so many ranks.

    Attributes:
        counts: samples seen and left out by reason, over all loader processes, since the run began (a resumed run reads
            the samples of its buffers again, and counts them again).
    """

    def __init__(self, cfg: Config, sets: list[DataSet], number: int, task_encoder: VideoTaskEncoder) -> None:
        data, num_streams = cfg.data, cfg.trainer.global_batch_size
        self._shape = {"num_streams": num_streams, "num_workers": data.num_workers}
        worker_config = _worker_config(number, num_streams, data.num_workers, cfg.trainer.seed)
        dataset = task_encoder.build_train_datasets(
            datasets=energon_sets(sets, True, worker_config, max_samples_per_sequence=_MAX_SAMPLES_PER_SEQUENCE),
            blend_mode=blend_mode(sets),
            worker_config=worker_config,
            batch_size=None,
            packing_buffer_size=data.packing_buffer,
            shuffle_buffer_size=-(-data.shuffle_buffer // num_streams),
        )
        count_broken_shards(dataset, task_encoder.tally)
        self._loader = _savable_loader(dataset)
        self._earlier: dict[str, int] = {}
        self._by_worker: dict[int, dict[str, int]] = {}

    def __iter__(self) -> Iterator[PackedBatch]:
        for packed in self._loader:
            self._by_worker[packed.worker] = packed.counts
            yield packed.batch

    @property
    def counts(self) -> dict[str, int]:
        return _sum_counts([self._earlier, *self._by_worker.values()])

    def save_state(self) -> dict[str, Any]:
        return {**self._shape, "counts": self.counts, "energon": to_plain(self._loader.save_state_rank())}

    def load_state(self, state: dict[str, Any]) -> None:
        for (name, value), key in zip(self._shape.items(), ("trainer.global_batch_size", "data.num_workers")):
            if state[name] != value:
                raise ValueError(
                    f"{key}={value}: the data loader's state was saved with {key}={state[name]}; resume with the same "
                    "value"
                )
        self._earlier = dict(state["counts"])
        self._loader.restore_state_rank(from_plain(state["energon"]))


def _next(batches: Iterator[PackedBatch]) -> PackedBatch:
    try:
        return next(batches)
    except SkipSample as error:
        # Energon skips samples everywhere but where it makes those of a saved state anew.
        changed_data(error)


def _sum_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in parts:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


class TrainLoader:
    """Endless packed batches of one data-parallel rank, in an order that can be saved and does not depend on the ranks.

    Energon's own state belongs to a rank among a number of ranks, and fits no other number. So the data are cut into
    ``trainer.global_batch_size`` streams, each an Energon loader of its own with a share of the samples, and stream j
    makes micro batch j of every step (see ``data.streams``). A rank reads the streams of its micro batches. Another
    number of ranks hands the same streams to other ranks: every step sees the samples that it would have seen, none is
    lost and none comes twice. A single order of all samples, of which rank r of n takes every n-th, would need only one
    number as its state, but every rank would read and tokenize everything, because packing decides where a batch ends.

    Args:
        cfg: uses ``data``, ``model.vision``, ``trainer.seed``, ``trainer.global_batch_size``, and what lengths
            must divide by (``length_multiple``).
        rank: data-parallel rank.
        world_size: number of data-parallel ranks.
        pad_to_multiple_of: of the length of every batch; None takes what parallelism and reduction need.
    """

    def __init__(self, cfg: Config, rank: int, world_size: int, pad_to_multiple_of: int | None = None) -> None:
        multiple = pad_to_multiple_of or cfg.length_multiple
        sets = _data_sets(cfg.data.train, "data.train", "train")
        features = features_of(sets, f"data.train={cfg.data.train}")
        encoder = SampleEncoder(cfg)
        self._streams = {
            number: _Stream(cfg, sets, number, VideoTaskEncoder(encoder, cfg.data.max_bad_share, multiple, features))
            for number in streams_of(rank, world_size, cfg.trainer.global_batch_size)
        }

    def __iter__(self) -> Iterator[PackedBatch]:
        """Batches without end, from the rank's streams in turn.

        Raises:
            ConfigError: more samples were bad than ``data.max_bad_share`` allows, or features do not fit the model or
                the sampling.
        """
        iterators = [iter(stream) for stream in self._streams.values()]
        try:
            while True:
                for iterator in iterators:
                    yield _next(iterator)
        except FatalSampleError as error:
            # Without its cause, which is a page of what loader processes and Energon wrote around the line.
            raise ConfigError(fatal_line(error)) from None

    @property
    def counts(self) -> dict[str, int]:
        """Samples seen and left out by reason, over the rank's streams, since the run began."""
        return _sum_counts(stream.counts for stream in self._streams.values())

    def save_state(self) -> dict[int, Any]:
        """The state of each of the rank's streams as of now, as plain values; between two steps."""
        return {number: stream.save_state() for number, stream in self._streams.items()}

    def load_state(self, states: dict[int, Any]) -> None:
        """Continues from saved states, one for each of the rank's streams; call it before iterating.

        Raises:
            ValueError: a state comes from another number of streams or workers.
        """
        for number, stream in self._streams.items():
            stream.load_state(states[number])


def _data_sets(path: str | None, key: str, part: str) -> list[DataSet]:
    if path is None:
        raise ConfigError(f"{key}=null: give an Energon data set folder; hybridprune shards writes one")
    return read_data_sets(path, part, key)


def _worker_config(rank: int, world_size: int, num_workers: int, seed: int) -> WorkerConfig:
    # Bad samples are skipped by name (BadSampleError); any other error is a bug and must not be swallowed.
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
        restore_error_handler=changed_data,
    )


def _savable_loader(dataset: Any) -> Any:
    loader = get_savable_loader(dataset, watchdog_timeout_seconds=_SLOW_BATCH_SECONDS)
    # Energon always asks for pinned memory, and torch warns in every run that has no accelerator.
    loader.pin_memory = torch.cuda.is_available()
    loader.worker_init_fn = partial(obey_parent_only, loader.worker_init_fn)
    return loader


def _read_messages(sample: RawSample) -> list[dict[str, Any]]:
    if len(sample.conversation) > _MOST_CONVERSATION_BYTES:
        message = f"its .{CONVERSATION_PART} has {len(sample.conversation)} bytes, above {_MOST_CONVERSATION_BYTES}"
        raise BadSampleError("malformed", sample.__key__, message)
    try:
        return parse_json(sample.conversation)["conversation"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"its .{CONVERSATION_PART} has no conversation ({error})"
        raise BadSampleError("malformed", sample.__key__, message) from error


def check_kind(key: str, videos: Sequence[StoredMedium], features: FeaturesInfo | None) -> None:
    """A packed sequence shows either frames or features of one tower: those that its data set is said to hold.

    Args:
        key: of the sample.
        videos: of the sample.
        features: of the data set; None: it holds videos.

    Raises:
        BadSampleError: the sample has others.
    """
    for video in videos:
        if isinstance(video, StoredFeatures) == (features is None):
            kinds = ("a video", "features") if features is not None else ("features", "videos")
            raise BadSampleError("video", key, f"{kinds[0]} in a data set of {kinds[1]}")
        try:
            other = isinstance(video, StoredFeatures) and features is not None and video.info.tower != features.tower
        except ValueError as error:
            raise BadSampleError("video", key, str(error)) from error
        if other:
            raise BadSampleError("video", key, "features of another tower than its data set's")
