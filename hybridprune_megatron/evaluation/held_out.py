"""Held-out clips and their questions, in the order of their shards.

Read straight from the shards: an evaluation wants every sample once and in order, with what is known about its answer,
and none of a training loader's shuffling, packing and state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.conversation import VIDEO_TOKEN
from hybridprune_megatron.data.features import StoredFeatures
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.data.stored_samples import read_samples


@dataclass(frozen=True)
class Question:
    """A held-out sample and what is known about its answer.

    Attributes:
        sample: encoded, with labels on the answer.
        kind: groups questions in reports.
        answer: the right answer.
        choices: all answers that questions of this kind have, equally often.
    """

    sample: EncodedSample
    kind: str
    answer: str
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.answer not in self.choices:
            raise ValueError(f"sample {self.sample.key}: answer {self.answer!r} is none of {', '.join(self.choices)}")


def chance(questions: Sequence[Question]) -> float:
    """Expected accuracy of a guess among the choices of each question."""
    return fmean([1 / len(question.choices) for question in questions])


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A held-out sample as it is stored: one video, one question.

    Attributes:
        key: its name.
        video: bytes of the video file, or features of its frames.
        messages: the conversation, question and answer.
        answer: the right one.
        kind: of the question.
        choices: all answers of this kind.
    """

    key: str
    video: bytes | StoredFeatures
    messages: list[dict[str, Any]]
    answer: str
    kind: str
    choices: tuple[str, ...]

    @property
    def question(self) -> str:
        """The text of the question, without the placeholder of the video."""
        return str(self.messages[0]["content"]).replace(VIDEO_TOKEN, "").strip()


def read_clips(folder: Path) -> Iterator[Clip]:
    """All samples of a data set with one video and a known answer each, in order.

    Raises:
        ValueError: the folder holds no shards, or samples without a known answer.
    """
    needs = "an evaluation needs one video and, under meta, kind, answer, choices"
    for sample in read_samples(folder):
        where, meta = f"{sample.shard}: sample {sample.key}", sample.meta
        if len(sample.videos) != 1:
            raise ValueError(f"{where} has {len(sample.videos)} videos; {needs}")
        (video,) = sample.videos
        if isinstance(video, StoredImage):
            raise ValueError(f"{where} has an image; {needs}")
        try:
            known = (meta["answer"], meta["kind"], tuple(meta["choices"]))
        except KeyError as error:
            raise ValueError(f"{where} has no {error}; {needs}") from None
        yield Clip(sample.key, video, sample.messages, *known)


def load_questions(cfg: Config, count: int) -> list[Question]:
    """The first samples of ``data.validation`` that can be used, encoded as in training.

    Args:
        cfg: uses ``data`` and ``model.vision``.

    Raises:
        ValueError: none can be used.
    """
    assert cfg.data.validation is not None, "data.validation is not set"
    encoder = SampleEncoder(cfg)
    questions: list[Question] = []
    for clip in read_clips(Path(cfg.data.validation)):
        if len(questions) == count:
            break
        try:
            (sample,) = encoder.encode(clip.key, clip.messages, [clip.video])
        except BadSampleError as error:
            logger.warning("left out (%s): %s", error.reason, error)
            last = error
            continue
        questions.append(Question(sample, clip.kind, clip.answer, clip.choices))
    if count and not questions:
        raise ValueError(
            f"data.validation={cfg.data.validation}: none of its samples can be used; the last one: {last}"
        )
    return questions
