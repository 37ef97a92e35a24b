"""Held-out clips and their questions, in the order of their shards.

Read straight from the shards: an evaluation wants every sample once and in order, with what is known about its answer,
and none of a training loader's shuffling, packing and state.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.prompt import VIDEO_TOKEN
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.evaluation.questions import Question


@dataclass(frozen=True)
class Clip:
    """A held-out sample as it is stored: one video, one question.

    Attributes:
        key: its name.
        video: bytes of the video file.
        messages: the conversation, question and answer.
        answer: the right one.
        kind: of the question.
        choices: all answers of this kind.
    """

    key: str
    video: bytes
    messages: list[dict[str, Any]]
    answer: str
    kind: str
    choices: tuple[str, ...]

    @property
    def question(self) -> str:
        """The text of the question, without the placeholder of the video."""
        return str(self.messages[0]["content"]).replace(VIDEO_TOKEN, "").strip()


def read_clips(folder: Path) -> Iterator[Clip]:
    """All samples of a data set that ``scripts/make_demo_data.py`` wrote, in order.

    Raises:
        ValueError: the folder holds no shards, or samples without a known answer.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"data.validation={folder}: no shards there; scripts/make_demo_data.py writes them")
    for shard in shards:
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for entry in tar:
                stream = tar.extractfile(entry)
                if stream is not None:
                    key, _, part = entry.name.partition(".")
                    parts.setdefault(key, {})[part] = stream.read()
        for key, contents in parts.items():
            yield _clip(key, contents, shard)


def _clip(key: str, parts: dict[str, bytes], shard: Path) -> Clip:
    try:
        content = json.loads(parts["json"])
        meta = content["meta"]
        return Clip(key, parts["mp4"], content["conversation"], meta["answer"], meta["kind"], tuple(meta["choices"]))
    except KeyError as error:
        raise ValueError(
            f"{shard}: sample {key} has no {error}; an evaluation needs an mp4 and, under meta, kind, answer, choices"
        ) from None


def load_questions(cfg: Config, count: int) -> list[Question]:
    """The first samples of ``data.validation``, encoded as in training.

    Args:
        cfg: uses ``data`` and ``model.vision``.
        count: how many at most.
    """
    assert cfg.data.validation is not None, "data.validation is not set"
    encoder = SampleEncoder(cfg)
    questions = []
    for clip in islice(read_clips(Path(cfg.data.validation)), count):
        (sample,) = encoder.encode(clip.key, clip.messages, [clip.video])
        questions.append(Question(sample, clip.kind, clip.answer, clip.choices))
    return questions
