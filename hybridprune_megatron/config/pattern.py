"""The hybrid layer pattern: symbols that are known, stages that are not empty."""

from __future__ import annotations

from hybridprune_megatron.checks import fail
from hybridprune_megatron.layers.experts import Experts
from hybridprune_megatron.layers.kinds import KINDS

# Symbols that megatron-core knows and this project does not.
UNSUPPORTED_SYMBOLS = {
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "latent attention",
    "/": "multi-token prediction",
}


def check_pattern(pattern: str, has_experts: bool = False) -> None:
    """Every symbol of the hybrid pattern is known, no pipeline stage is empty, and E layers have sizes.

    Args:
        pattern: layers with stage cuts.
        has_experts: whether model.experts is given.
    """
    meanings = {symbol: kind.label for symbol, kind in KINDS.items()} | {"|": "pipeline boundary"}
    known = ", ".join(f"{symbol} ({meaning})" for symbol, meaning in meanings.items())
    for symbol in pattern:
        if symbol in UNSUPPORTED_SYMBOLS and symbol not in KINDS:
            what = f"has {symbol!r} ({UNSUPPORTED_SYMBOLS[symbol]}), which is not supported yet"
            raise fail("model.hybrid_pattern", pattern, what, f"use only {known}")
        if symbol not in meanings:
            raise fail("model.hybrid_pattern", pattern, f"has the unknown symbol {symbol!r}", f"use only {known}")
    if not all(pattern.split("|")):
        raise fail(
            "model.hybrid_pattern",
            pattern,
            "every pipeline stage needs a layer",
            "put a | only between two layers, e.g. M-M*|-M-",
        )
    if (Experts.symbol in pattern) != has_experts:
        has = f"has {Experts.symbol} layers, and model.experts is null"
        what = has if not has_experts else f"has no {Experts.symbol} layer, and model.experts is set"
        raise fail("model.hybrid_pattern", pattern, what, "give both or neither")
