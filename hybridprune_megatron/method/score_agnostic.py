"""Scores that look at nothing: the baselines every query-conditioned score must beat."""

from __future__ import annotations

from dataclasses import dataclass

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

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals
        return self._draw(layout, layer)

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals
        return self._draw(layout, layer)

    def _draw(self, layout: TokenLayout, layer: int) -> Tensor:
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

    def attention(self, signals: AttentionSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals, layer
        return self._spread(layout)

    def mamba(self, signals: MambaSignals, layout: TokenLayout, layer: int) -> Tensor:
        del signals, layer
        return self._spread(layout)

    def _spread(self, layout: TokenLayout) -> Tensor:
        device = layout.visual_index.device
        parts = [torch.empty(0, device=device)]
        for count in layout.visual_counts:
            rank = torch.arange(count, device=device)
            fraction = torch.zeros(count, device=device)
            for bit in range(max(count - 1, 1).bit_length()):
                fraction += ((rank >> bit) & 1).float() * 0.5 ** (bit + 1)
            parts.append(1.0 - fraction)
        return torch.cat(parts)
