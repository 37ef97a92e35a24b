"""The scorers by name. A new one is a file ``score_*.py``, a line here, a config in ``conf/reduction/``, a test row."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.score_agnostic import RandomScorer, UniformScorer
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals


class Scorer(Protocol):
    """Scores the visual tokens of a packed sequence in one layer.

    Both methods get this rank's heads and return the *mean over these heads*, float32 [V] in the order of
    ``layout.visual_index``, higher is more important; the caller averages over tensor-parallel ranks. They must be
    deterministic and free of state.
    """

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor: ...

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor: ...


SCORERS: dict[str, Scorer] = {
    "query": QueryScorer(),
    "query_with_decay": QueryScorer(decay=True),
    "random": RandomScorer(),
    "uniform": UniformScorer(),
}


def get_scorer(name: str) -> Scorer:
    """The scorer of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCORERS:
        raise ValueError(f"reduction.scorer={name!r}: allowed are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]
