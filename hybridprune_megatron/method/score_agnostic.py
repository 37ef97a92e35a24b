"""Scores that look at nothing: the baselines that every query-conditioned score must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hybridprune_megatron.bounds import Seed
from hybridprune_megatron.layers.operations import Cost, elementwise
from hybridprune_megatron.method.scorer import FP32, Scorer, ScoreSizes

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.signals import Signals

_MASK_32 = 0xFFFFFFFF


class AgnosticScorer(Scorer):
    """Scores any kind of layer without looking at it, on every rank alike."""

    needs_question: ClassVar[bool] = False
    reads_signals: ClassVar[bool] = False

    def can_score(self, kind: str) -> bool:
        return True

    def score(self, signals: Signals, layout: TokenLayout, layer: int) -> Tensor:
        return self.draw(layout, layer)

    def draw(self, layout: TokenLayout, layer: int) -> Tensor:
        """float32 [V] from 0 to 1."""
        raise NotImplementedError

    def costs(self, kind: str, sizes: ScoreSizes) -> Mapping[str, Cost]:
        return {"score": elementwise(sizes.visual, FP32)}


@dataclass(frozen=True)
class RandomScorer(AgnosticScorer):
    """A pseudo-random score of (seed, layer, position): no state, so recomputation and every rank draw the same.

    Attributes:
        seed: changes the draw.
    """

    name: ClassVar[str] = "random"
    seed: Seed = 0

    def draw(self, layout: TokenLayout, layer: int) -> Tensor:
        """float32 [V] from 0 to 1, the same for the same position in a sample."""
        value = layout.position[layout.visual_index] + 0x9E3779B9 * (layer + 1) + 0x85EBCA6B * (self.seed + 1)
        # Two rounds of a 32-bit multiply-xorshift mix.
        for multiplier in (0x7FEB352D, 0x846CA68B):
            value = value & _MASK_32
            value = ((value ^ (value >> 16)) * multiplier) & _MASK_32
        value = value ^ (value >> 16)
        return value.float() / _MASK_32


@dataclass(frozen=True)
class UniformScorer(AgnosticScorer):
    """Evenly spread tokens: the r-th visual token scores by the bit-reversed fraction of r, so any top-k is spread."""

    name: ClassVar[str] = "uniform"

    def draw(self, layout: TokenLayout, layer: int) -> Tensor:
        """float32 [V] from 0 to 1; the r-th token of every sample has the same."""
        import torch

        device = layout.visual_index.device
        parts = [torch.empty(0, device=device)]
        for count in layout.visual_counts:
            rank = torch.arange(count, device=device)
            fraction = torch.zeros(count, device=device)
            for bit in range(max(count - 1, 1).bit_length()):
                fraction += ((rank >> bit) & 1).float() * 0.5 ** (bit + 1)
            parts.append(1.0 - fraction)
        return torch.cat(parts)
