"""Retention as it happened: shares of visual tokens that really entered every layer, from the layouts of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hybridprune_megatron.method.layout import TokenLayout


@dataclass(frozen=True)
class Retention:
    """Measured shares of visual tokens.

    Attributes:
        by_layer: share that entered every layer, mean over samples.
        mean: over layers; to be compared with the budget.
    """

    by_layer: tuple[float, ...]
    mean: float

    @staticmethod
    def of(shares: Sequence[Sequence[float]]) -> Retention:
        """The mean over samples.

        Args:
            shares: one row a sample, one share a layer; without rows (nothing shown was visual) nothing was dropped.
        """
        by_layer = tuple(fmean(layer) for layer in zip(*shares)) or (1.0,)
        return Retention(by_layer, fmean(by_layer))


def sample_retention(trace: Sequence[TokenLayout]) -> list[tuple[float, ...]]:
    """Per sample with visual tokens, the share of them that entered every layer.

    Args:
        trace: the layout that entered every layer (``VideoLanguageModel.logits``); of the first one too, a reduction in
            front of the model may have dropped tokens.
    """
    originals = trace[0].original_visual_counts
    counts = zip(*(layout.visual_counts for layout in trace))
    return [tuple(count / whole for count in sample) for sample, whole in zip(counts, originals) if whole]
