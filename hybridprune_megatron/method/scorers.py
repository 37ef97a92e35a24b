"""The scorers by name. A new one is a file ``score_*.py``, a line here, a config in ``conf/reduction/``, a test row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.merge import Ranking
from hybridprune_megatron.method.score_agnostic import RandomScorer, UniformScorer
from hybridprune_megatron.method.score_output import OutputNormScorer
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals


class Scorer(Protocol):
    """Scores the visual tokens of a packed sequence in one layer.

    Both methods get this rank's heads and return float32 [V] in the order of ``layout.visual_index``, higher is more
    important, pooled over these heads; the caller pools over the ranks with the other heads (tensor-parallel ones,
    for Mamba layers context-parallel ones too), whose heads are as many. They must
    be deterministic and free of state.

    Attributes:
        attention_pooling: "mean" where ``attention`` is the mean over heads; anything else: it is the highest.
        mamba_pooling: the same for ``mamba``.
    """

    @property
    def attention_pooling(self) -> str: ...

    @property
    def mamba_pooling(self) -> str: ...

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor: ...

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor: ...


class OutputScorer(Protocol):
    """Ranks the visual tokens by the hidden states behind a layer, whatever kind of layer it was.

    Gets the whole packed sequence and all channels; every tensor-parallel rank ranks alike. Must be deterministic and
    free of state.
    """

    def output(self, hidden: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Ranking: ...


SCORERS: dict[str, type[Scorer]] = {
    "query": QueryScorer,
    "random": RandomScorer,
    "uniform": UniformScorer,
}
OUTPUT_SCORERS: dict[str, type[OutputScorer]] = {"utrc": OutputNormScorer}


def build_scorer(settings: Mapping[str, Any]) -> Any:
    """The scorer that settings name, its fields taken from the settings of the same name.

    Args:
        settings: the keys of the reduction group; a field that is missing has its default.

    Returns:
        A ``Scorer``, or an ``OutputScorer`` for the names of ``OUTPUT_SCORERS``.

    Raises:
        ValueError: an unknown name.
    """
    name = settings["scorer"]
    scorers: dict[str, Any] = {**SCORERS, **OUTPUT_SCORERS}
    if name not in scorers:
        raise ValueError(f"reduction.scorer={name!r}: allowed are {', '.join(sorted(scorers))}")
    scorer = scorers[name]
    return scorer(**{field.name: settings[field.name] for field in fields(scorer) if field.name in settings})
