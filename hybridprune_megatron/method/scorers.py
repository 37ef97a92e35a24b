"""The scores by name. A new one needs no line here: name it by its dotted path, or announce it as an entry point."""

from __future__ import annotations

from hybridprune_megatron.method.announced import ANNOUNCED
from hybridprune_megatron.method.score_agnostic import RandomScorer, UniformScorer
from hybridprune_megatron.method.score_output import OutputNormScorer
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.scorer import KEY, Score
from hybridprune_megatron.plugins import Registry

SCORERS: Registry[Score] = Registry(
    KEY,
    Score,
    (QueryScorer, RandomScorer, UniformScorer, OutputNormScorer, *ANNOUNCED),
    group="hybridprune_megatron.scorers",
)
