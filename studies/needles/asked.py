"""Held-out questions of a study: encoded, with what the data say about the clip, and another question about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.conversation import VIDEO_TOKEN
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.stored_samples import StoredSample, read_samples


@dataclass(frozen=True)
class Asked:
    """A question about a clip.

    Attributes:
        sample: encoded, with labels on the answer.
        meta: of the data set. ``kind``, ``answer`` and ``choices`` are there; ``others`` are more questions about the
            clip, none about the same needle.
        other: the same clip with the first of the others in the place of the question; None: it has none.
    """

    sample: EncodedSample
    meta: dict[str, Any]
    other: EncodedSample | None = None

    @property
    def num_visual(self) -> int:
        """Visual tokens of the clip."""
        return self.sample.layout.num_visual

    def indices(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """int64 indices into the visual tokens, in order, of pairs of a frame and a token within it."""
        per_frame = self.meta["tokens_per_frame"]
        return tensor([frame * per_frame + patch for frame, patch in tokens])


def read_asked(cfg: Config, count: int) -> list[Asked]:
    """The first questions of ``data.validation``.

    Args:
        cfg: uses ``data`` and ``model.vision``.
        count: how many at most.

    Raises:
        ValueError: a sample has no known answer, or cannot be encoded.
    """
    assert cfg.data.validation is not None, "data.validation is not set"
    encoder, found = SampleEncoder(cfg), []
    for stored in islice(read_samples(Path(cfg.data.validation)), count):
        missing = [name for name in ("kind", "answer", "choices") if name not in stored.meta]
        if missing:
            raise ValueError(f"{stored.shard}: sample {stored.key} has no {', '.join(missing)} in its meta")
        (sample,) = encoder.encode(stored.key, stored.messages, stored.videos)
        found.append(Asked(sample, stored.meta, _with_another_question(encoder, stored)))
    return found


def _with_another_question(encoder: SampleEncoder, stored: StoredSample) -> EncodedSample | None:
    if not stored.meta.get("others"):
        return None
    first, *rest = stored.messages
    # What is left of the text is the video's placeholder, before or after the question.
    lines = str(first["content"]).split("\n")
    lines = [line if line == VIDEO_TOKEN else stored.meta["others"][0]["question"] for line in lines]
    (sample,) = encoder.encode(stored.key, [{**first, "content": "\n".join(lines)}, *rest], stored.videos)
    return sample
