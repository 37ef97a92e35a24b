"""What a model drops: the same in every forward pass, in training and in the export. A pass is ``reduction_pass``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybridprune_megatron.method.front import Front
from hybridprune_megatron.method.scorer import OutputScorer, Score, Scorer
from hybridprune_megatron.method.settings import Select


@dataclass(frozen=True)
class Reduction:
    """What to drop where.

    Attributes:
        score: ranks the visual tokens.
        retention: share of the original visual tokens that enters every layer of the whole model. The first one is
            below 1 where something drops tokens before the language model.
        select: how tokens are chosen once they are scored.
        front: drops or merges tokens before the language model; None: all enter it.
        dt_filter: share of its visual tokens' steps that a Mamba head with a long memory keeps; None: no filter.
    """

    score: Score
    retention: tuple[float, ...]
    select: Select = field(default_factory=Select)
    front: Front | None = None
    dt_filter: float | None = None

    @property
    def scorer(self) -> Scorer | None:
        """What asks mixers; None: ``output_scorer`` ranks."""
        return self.score if isinstance(self.score, Scorer) else None

    @property
    def output_scorer(self) -> OutputScorer | None:
        """What ranks by the output of a layer; None: ``scorer`` does."""
        return self.score if isinstance(self.score, OutputScorer) else None

    @property
    def looks_at_rows(self) -> bool:
        """Whether what is dropped, or what becomes of it, depends on hidden states after the layer."""
        return self.output_scorer is not None or self.select.dropped == "merge"


def at_least(retention: Sequence[float], fewest: int, num_visual: int) -> tuple[float, ...]:
    """A retention under which a front passes on at least ``fewest`` tokens; what is dropped inside stays the same."""
    least = fewest / max(num_visual, 1)
    return tuple(max(share, least) if share == retention[0] else share for share in retention)
