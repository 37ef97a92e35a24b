"""Held-out samples without a data set, in the place of ``data.validation_set.ValidationSet``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridprune_megatron.data.batch import PADDING_KEY, EncodedSample, PackedBatch, pack
from tests.engine.tiny import counting_sample
from tests.models.tiny import tiny_sample


@dataclass(frozen=True)
class Known:
    """A planned sample.

    Attributes:
        number: of the sample.
        answered: its answer is known.
    """

    number: int
    answered: bool


class FewSamples:
    """Encoded samples in packed sequences of a few.

    Args:
        samples: all of them.
        a_pack: how many a packed sequence has.
        multiple_of: what its length divides by.
        unanswered: numbers of samples without a known answer.
        broken: numbers of samples that cannot be decoded.
    """

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        a_pack: int = 1,
        multiple_of: int = 1,
        unanswered: Sequence[int] = (),
        broken: Sequence[int] = (),
    ) -> None:
        self.samples, self._a_pack, self._multiple = samples, a_pack, multiple_of
        self._unanswered, self._broken = unanswered, broken

    def plan(self) -> list[list[Known]]:
        known = [Known(number, number not in self._unanswered) for number in range(len(self.samples))]
        return [known[start : start + self._a_pack] for start in range(0, len(known), self._a_pack)]

    def read(self, planned: Sequence[Known]) -> tuple[PackedBatch | None, list[bool]]:
        present = [each.number not in self._broken for each in planned]
        whole = [self.samples[each.number] for each, there in zip(planned, present) if there]
        return pack(whole, self._multiple) if whole else None, present

    def filler(self) -> PackedBatch:
        sample = tiny_sample(0, 0)
        ids, labels = sample.input_ids, sample.labels
        return pack([EncodedSample(PADDING_KEY, ids, labels, sample.layout, sample.pixel_values)], self._multiple)


def counts(number: int, answered: bool = True) -> FewSamples:
    """For the tiny GPT, which takes one sample a sequence."""
    generator = torch.Generator().manual_seed(11)
    samples = [counting_sample(f"held-{index}", generator) for index in range(number)]
    return FewSamples(samples, unanswered=() if answered else range(number))


def clips(number: int) -> FewSamples:
    """For the project's model, two clips a sequence."""
    return FewSamples([tiny_sample(index, 2 + index) for index in range(number)], a_pack=2)
