"""Oracles: fronts that keep what a question is about, or as much of what it is not about.

Both fill the rest of the budget with tokens drawn at random alike, so the gap between them is what a look at the
question can be worth on a benchmark.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hybridprune_megatron.method.front import Front
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.merge import Ranking
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.score_agnostic import RandomScorer
from studies.needles.asked import Asked

#: Keep the evidence; the evidence and the tokens around it; as much of other needles and never the evidence.
ORACLES = ("evidence", "evidence_and_neighbours", "not_asked")


@dataclass(frozen=True)
class GivenFront(Front):
    """Keeps the tokens with the highest of given scores.

    Attributes:
        scores: float [V], of the visual tokens of the one packed sequence this is for.
    """

    name: ClassVar[str] = "given"
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """As given."""
        return Ranking(self.scores)


def oracle_scores(row: Asked, case: str) -> Tensor:
    """float [V] of a row: above 1 what an oracle keeps, below 0 what it never keeps, in between a random order."""
    generator = torch.Generator().manual_seed(zlib.crc32(row.sample.key.encode("ascii")))
    scores = torch.rand(row.num_visual, generator=generator)
    evidence = row.indices(row.meta["evidence"])
    if case == "not_asked":
        scores[other_needles(row, len(evidence), generator)] += 2
        scores[evidence] -= 2
        return scores
    if case == "evidence_and_neighbours":
        scores[neighbours(row, row.meta["evidence"])] += 2
    scores[evidence] += 4
    return scores


def other_needles(row: Asked, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count] tokens of needles that are not asked for, showing by showing in random order."""
    asked = {tuple(token) for token in row.meta["evidence"]}
    showings = row.meta["needles"]
    tokens = [
        tuple(token)
        for index in torch.randperm(len(showings), generator=generator).tolist()
        for token in showings[index]["tokens"]
    ]
    return row.indices([token for token in dict.fromkeys(tokens) if token not in asked][:count])


def neighbours(row: Asked, tokens: Iterable[Sequence[int]]) -> Tensor:
    """int64 tokens around some tokens in their frames, these included."""
    side = round(row.meta["tokens_per_frame"] ** 0.5)
    found: set[tuple[int, int]] = set()
    for frame, patch in tokens:
        for y in range(max(patch // side - 1, 0), min(patch // side + 2, side)):
            found.update((frame, y * side + x) for x in range(max(patch % side - 1, 0), min(patch % side + 2, side)))
    return row.indices(sorted(found))


def oracle(row: Asked, case: str, share: float, layers: int) -> Reduction:
    """What an oracle passes on to the language model of one row; nothing is dropped inside.

    Args:
        case: one of ``ORACLES``.
        share: of the visual tokens that stay.
        layers: of the model.
    """
    return Reduction(RandomScorer(), (share,) * layers, front=GivenFront(scores=oracle_scores(row, case)))
