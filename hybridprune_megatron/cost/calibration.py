"""Seconds of a prefill from the seconds of its pieces, measured on one machine at other lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hybridprune_megatron.cost.prefill import Prefill

# Where pieces are measured, as shares of the tokens of the prefill that is predicted. That length itself is not among
# them; reduced layers see far fewer tokens, and one point beyond spares extrapolating.
SHARES = (1 / 32, 1 / 8, 1 / 2, 3 / 2)


@dataclass(frozen=True)
class Calibration:
    """Seconds of every piece by the tokens it was measured with.

    Attributes:
        seconds: by piece ("M", "*", "-", "score M", "score *", "drop", "ends"), then by tokens.
    """

    seconds: Mapping[str, Mapping[int, float]]

    def at(self, piece: str, tokens: int) -> float:
        """Seconds at a length: a straight line in logarithms between (or beyond) the two nearest measured lengths.

        So a piece that grows with a power of the length is met exactly, whatever the power. A piece that was not
        measured (the score of a scorer that asks no mixer) takes no time.
        """
        measured = sorted(self.seconds.get(piece, {}).items())
        if not measured:
            return 0.0
        if len(measured) == 1:
            return measured[0][1]
        spans = list(pairwise(measured))
        (low, low_seconds), (high, high_seconds) = next((span for span in spans if tokens <= span[1][0]), spans[-1])
        power = math.log(high_seconds / low_seconds) / math.log(high / low)
        return low_seconds * (tokens / low) ** power


@dataclass(frozen=True)
class Predicted:
    """Seconds of one prefill of the language model.

    Attributes:
        full: without reduction.
        reduced: with it.
        scoring: of that, scoring and dropping.
    """

    full: float
    reduced: float
    scoring: float

    @property
    def ratio(self) -> float:
        """Full over reduced."""
        return self.full / self.reduced


def calibration_lengths(tokens: int) -> list[int]:
    """Lengths to measure pieces at in order to predict a prefill of so many tokens."""
    return [max(16, round(tokens * share)) for share in SHARES]


def predict(prefill: Prefill, calibration: Calibration) -> Predicted:
    """Adds up the pieces of a prefill, each at the length it has there."""
    prompt = prefill.prompt
    full = sum(calibration.at(row.symbol, prompt.tokens) for row in prefill.rows)
    reduced = scoring = 0.0
    for row in prefill.rows:
        tokens = row.visual + prompt.text
        reduced += calibration.at(row.symbol, tokens)
        if row.scoring:
            scoring += calibration.at(f"score {row.symbol}", tokens) + calibration.at("drop", tokens)
    last = prefill.rows[-1].visual + prompt.text
    return Predicted(
        full=full + calibration.at("ends", prompt.tokens),
        reduced=reduced + scoring + calibration.at("ends", last),
        scoring=scoring,
    )


def sample_sizes(tokens: int, text: int, question: int) -> Sequence[int]:
    """Visual tokens, text and question of a calibration sample of some length: short samples have less text."""
    text = min(text, tokens // 2)
    return tokens - text, text, min(question, text)
