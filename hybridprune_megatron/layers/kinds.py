"""The kinds of layers that a hybrid pattern is made of, by symbol."""

from __future__ import annotations

from hybridprune_megatron.layers.attention import Attention
from hybridprune_megatron.layers.experts import Experts
from hybridprune_megatron.layers.kind import LayerKind
from hybridprune_megatron.layers.mamba import Mamba
from hybridprune_megatron.layers.mlp import Mlp

KINDS: dict[str, LayerKind] = {}


def add_kind(kind: LayerKind) -> None:
    """Makes a kind of layer known; its modules are added in ``models.specs`` and ``export.layers``."""
    assert kind.symbol not in KINDS, f"{kind.symbol} is {KINDS[kind.symbol].label}"
    KINDS[kind.symbol] = kind


for known in (Mamba(), Attention(), Mlp(), Experts()):
    add_kind(known)
