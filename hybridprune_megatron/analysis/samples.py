"""Samples to analyse: a video and its question, without the answer, and what the data set knows about needles in it.

The answer is cut off: a probe of a state that has read the answer would find the answer.

Shape letters: V visual tokens of one sample, F frames.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.analysis.strip import KeptPatches
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.conversation import VIDEO_TOKEN
from hybridprune_megatron.data.features import StoredFeatures
from hybridprune_megatron.data.prompt import Shown
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.data.stored_samples import StoredSample, read_samples
from hybridprune_megatron.data.video import list_frames
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalysisSample:
    """One prompt.

    Attributes:
        prompt: encoded up to the first answer token.
        question: what is asked.
        answer: the right answer, "" if there is none.
        evidence: int64, rising, frames that the answer needs; None where the data set does not say.
        needles: attributes of every needle, among them ``frames``, the frames that show it; empty without needles.
    """

    prompt: EncodedSample
    question: str
    answer: str
    evidence: tuple[int, ...] | None
    needles: tuple[dict[str, Any], ...]

    def frame_numbers(self) -> Tensor:
        """int64 [V] frame of every visual token, counted over all videos of the sample."""
        spans = [span for span in self.prompt.layout.spans if span.kind == TokenKind.FRAME]
        return torch.tensor([number for number, span in enumerate(spans) for _ in range(span.num_tokens)])

    def visual_numbers(self) -> Tensor:
        """int64 [L]: which visual token stands at a position of the prompt, -1 for text."""
        is_visual = torch.tensor(self.prompt.layout.kinds()) == TokenKind.FRAME
        return torch.where(is_visual, is_visual.cumsum(0) - 1, -1)

    def patches(self, kept: Tensor, symbols: str) -> KeptPatches:
        """What a strip shows of the sample.

        Args:
            kept: bool [K, V], see ``measures.kept_tokens``.
            symbols: of the layers.
        """
        title = self.question + (f" ({self.answer})" if self.answer else "")
        return KeptPatches(
            self.prompt.pixel_values, self.frame_numbers(), kept.cpu(), symbols, title, self.evidence or ()
        )


class SampleReader:
    """Encodes stored samples as in training.

    Args:
        cfg: uses ``data`` and ``model``.
    """

    def __init__(self, cfg: Config, folder: Path) -> None:
        self.encoder = SampleEncoder(cfg)
        self.folder = folder

    def samples(self) -> Iterator[AnalysisSample]:
        """All samples that show something, in order.

        Raises:
            ValueError: the folder holds no data set.
        """
        for stored in read_samples(self.folder):
            if stored.videos:
                yield from self._usable(stored, self.encode)

    def probe_samples(self, label: str, question: str | None) -> Iterator[AnalysisSample]:
        """Samples whose needle has a label that nothing but its pixels can give away.

        These are the samples with one needle, shown to the model, whose question does not name the label. A data set
        without needles gives all its samples.

        Args:
            question: asked instead of the sample's own, attributes of the needle in braces.

        Raises:
            ValueError: the needles have no such attribute.
        """
        for stored in read_samples(self.folder):
            needles = stored.meta.get("needles", [])
            if not needles and stored.videos:
                yield from self._usable(stored, self.encode)
            elif len(needles) == 1:
                (needle,) = needles
                words = sorted(name for name, value in needle.items() if isinstance(value, str))
                if label not in words:
                    raise ValueError(f"label={label}: needles of {self.folder} have {', '.join(words)}; choose one")
                asked = stored if question is None else ask(stored, fill(question, needle))
                for sample in self._usable(asked, self.encode):
                    if sample.needles[0]["frames"] and needle[label] not in sample.question:
                        yield sample

    def first_turns(self) -> Iterator[EncodedSample]:
        """All samples that show something, in order, each with its first question and the answer to it."""
        for stored in read_samples(self.folder):
            if stored.videos:
                yield from self._usable(replace(stored, messages=stored.messages[:2]), self._encoded)

    def _usable[T](self, stored: StoredSample, encode: Callable[[StoredSample], T]) -> Iterator[T]:
        """The sample, or nothing where training would leave it out."""
        try:
            yield encode(stored)
        except BadSampleError as error:
            logger.warning("left out (%s): %s", error.reason, error)

    def encode(self, stored: StoredSample) -> AnalysisSample:
        """One stored sample, its first question only."""
        draft = self.encoder.draft(stored.key, stored.messages, stored.videos)[0]
        sample = self.encoder.finish(draft)
        meta, video = stored.meta, stored.videos[0]
        known = len(stored.videos) == 1 and ("evidence_frames" in meta or "needles" in meta)
        shown = _source_frames(video, draft.fitted.shown[0]) if known and not isinstance(video, StoredImage) else []
        evidence = None
        if shown and "evidence_frames" in meta:
            evidence = frames_within(shown, meta["evidence_frames"])
        needles = []
        for needle in meta.get("needles", []) if shown else []:
            span = (needle["first_frame"], needle["first_frame"] + needle["num_frames"])
            needles.append({**needle, "frames": frames_within(shown, [span])})
        question = str(stored.messages[0]["content"]).replace(VIDEO_TOKEN, "").strip()
        return AnalysisSample(cut_answer(sample), question, str(meta.get("answer", "")), evidence, tuple(needles))

    def _encoded(self, stored: StoredSample) -> EncodedSample:
        return self.encoder.encode(stored.key, stored.messages, stored.videos)[0]


def ask(stored: StoredSample, question: str) -> StoredSample:
    """The same video with another question and no answer."""
    content = f"{VIDEO_TOKEN}\n{question}"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "-"}]
    return replace(stored, messages=messages, meta=stored.meta | {"answer": ""})


def fill(question: str, needle: dict[str, Any]) -> str:
    """A question with a needle's attributes in its braces.

    Raises:
        ValueError: an attribute that it does not have.
    """
    try:
        return question.format(**needle)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"question={question!r}: {error!r}; attributes are {', '.join(sorted(needle))}") from None


def cut_answer(sample: EncodedSample) -> EncodedSample:
    """A sample up to its first answer token."""
    spans: list[Span] = []
    for span in sample.layout.spans:
        if span.kind == TokenKind.ANSWER:
            break
        spans.append(span)
    layout = SampleLayout(tuple(spans))
    length = layout.num_tokens
    return replace(sample, input_ids=sample.input_ids[:length], labels=sample.labels[:length], layout=layout)


def frames_within(shown: Sequence[int], spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Which of the shown frames lie in one of the spans [first, stop) of the file's frames."""
    return tuple(number for number, frame in enumerate(shown) if any(first <= frame < stop for first, stop in spans))


def _source_frames(video: bytes | StoredFeatures, shown: Shown) -> list[int]:
    """Which frames of the file the model is shown, in order."""
    assert not isinstance(shown, int), "an image has no frames"
    times = video.video_seconds if isinstance(video, StoredFeatures) else list_frames(video)
    number = {time: index for index, time in enumerate(times)}
    return [number[time] for time in shown]
