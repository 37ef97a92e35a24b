"""Scores that look at nothing: the baselines every query-conditioned score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals

_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomScorer:
    """A pseudo-random score of (seed, layer, position): no state, so recomputation and every rank draw the same.

    Attributes:
        seed: changes the draw.
    """

    seed: int = 0
    # Every rank draws the same, so their mean is what each has.
    attention_pooling: ClassVar[str] = "mean"
    mamba_pooling: ClassVar[str] = "mean"

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals
        return self.draw(layout, layer)

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals
        return self.draw(layout, layer)

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
class UniformScorer:
    """Evenly spread tokens: the r-th visual token scores by the bit-reversed fraction of r, so any top-k is spread."""

    attention_pooling: ClassVar[str] = "mean"
    mamba_pooling: ClassVar[str] = "mean"

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals, layer
        return self.spread(layout)

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals, layer
        return self.spread(layout)

    def spread(self, layout: TokenLayout) -> Tensor:
        """float32 [V] from 0 to 1; the r-th token of every sample has the same."""
        device = layout.visual_index.device
        parts = [torch.empty(0, device=device)]
        for count in layout.visual_counts:
            rank = torch.arange(count, device=device)
            fraction = torch.zeros(count, device=device)
            for bit in range(max(count - 1, 1).bit_length()):
                fraction += ((rank >> bit) & 1).float() * 0.5 ** (bit + 1)
            parts.append(1.0 - fraction)
        return torch.cat(parts)
