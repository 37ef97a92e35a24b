"""Samples of a data set in the order of its shards, with what the data set says about them.

Read straight from the shards: an evaluation wants every sample once and in order, and none of a training loader's
shuffling, packing and state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.json_text import parse_json, short
from hybridprune_megatron.config.stores import AnyPath
from hybridprune_megatron.data.conversation import media_types, read_conversation
from hybridprune_megatron.data.shards import CONVERSATION_PART, read_shard, stored_videos
from hybridprune_megatron.data.stored_media import StoredMedium, kinds_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a shard.

    Attributes:
        key: its name.
        messages: the conversation.
        meta: what the data set says about it; empty where it says nothing.
        videos: its video and image files, or features of their frames, in the order of their placeholders.
        shard: the file it comes from; it may lie in a store.
    """

    key: str
    messages: list[dict[str, Any]]
    meta: dict[str, Any]
    videos: tuple[StoredMedium, ...]
    shard: AnyPath

    @staticmethod
    def of(key: str, parts: Mapping[str, bytes], shard: AnyPath) -> StoredSample:
        """The sample of some parts.

        Raises:
            ValueError: its conversation, or what is said about it, is malformed.
        """
        try:
            content = parse_json(parts.get(CONVERSATION_PART, b""))
            messages, meta = content["conversation"], content.get("meta", {})
            videos = stored_videos(parts)
            read_conversation(messages, media_types(kinds_of(videos)))
            if not isinstance(meta, dict):
                raise ValueError(f"its meta is {short(meta)}")
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
        return StoredSample(key, messages, meta, videos, shard)


def read_samples(
    folder: Path, left_out: Callable[[str], object] = logger.warning, shards: Sequence[Path] | None = None
) -> Iterator[StoredSample]:
    """All samples of an Energon data set that ``ShardWriter`` wrote, in order.

    Args:
        left_out: is told of every sample that cannot be read.
        shards: of the folder, in order; None: all of them.

    Raises:
        ValueError: the folder holds no shards of its own, or no sample can be read.
    """
    shards = sorted(folder.glob("*.tar")) if shards is None else shards
    if not shards:
        raise ValueError(f"data.validation={folder}: no shards there; scripts/make_demo_data.py writes them")
    count = 0
    for shard in shards:
        if shard.is_symlink() or not shard.is_file():
            raise ValueError(f"{shard} is not a file but a link or a device: put the file itself there")
        for key, parts in read_shard(shard, left_out):
            try:
                sample = StoredSample.of(key, parts, shard)
            except ValueError as error:
                left_out(f"left out (malformed): sample {key} of {shard}: {error}")
                continue
            count += 1
            yield sample
    if not count:
        raise ValueError(f"data.validation={folder}: none of its samples can be read; write it again")
