"""What a layer has computed anyway and a scorer may use. Shape letters as in ``score_query``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionSignals:
    """Of one attention layer, this rank's heads.

    Attributes:
        q: [L, H, E] queries as they enter the dot product.
        k: [L, K, E] keys; K divides H, head h reads key head h * K // H.
    """

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class MambaSignals:
    """Of one Mamba-2 layer, this rank's heads.

    Attributes:
        B: [L, G, N] input projections after convolution and SiLU.
        C: [L, G, N] output projections after convolution and SiLU.
        dt: float32 [L, H] step sizes after softplus; head h reads group h * G // H.
        A: float32 [H] decay rates, below 0.
    """

    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
