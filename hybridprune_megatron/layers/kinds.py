"""The kinds of layers that a hybrid pattern is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        symbol: in a hybrid pattern.
        name: in words and in ``reduction.layers``.
        colour: in figures.
        scores: whether its mixer computes something that visual tokens can be scored with.
    """

    symbol: str
    name: str
    colour: str
    scores: bool = False

    def score_sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, groups that share keys, and width of a key, of a layer that scores."""
        if self.symbol == "M":
            return model.mamba_num_heads, model.mamba_num_groups, model.mamba_state_dim
        return model.num_attention_heads, model.num_query_groups, model.kv_channels


KINDS: dict[str, LayerKind] = {
    kind.symbol: kind
    for kind in (
        LayerKind("M", "mamba", "#0072B2", scores=True),
        LayerKind("*", "attention", "#D55E00", scores=True),
        LayerKind("-", "mlp", "#999999"),
        LayerKind("E", "experts", "#009E73"),
    )
}
