"""Held-out questions whose answers are known, and what guessing would score on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hybridprune_megatron.data.batch import EncodedSample


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
