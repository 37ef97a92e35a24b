"""What a layer has computed anyway and a scorer may use. Shape letters as in ``score_query``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout


class HeldKeys(Protocol):
    """Which keys of a packed sequence one rank of a context-parallel group holds, J of L; models/context.py has it.

    Attributes:
        positions: int64 [J], rising, where they stand in the packed sequence.
    """

    @property
    def positions(self) -> Tensor: ...

    def rows(self, first: int, last: int) -> list[slice]:
        """Rows of k whose positions lie in [first, last); all on the host."""
        ...

    def total(self, log_sums: Tensor) -> Tensor:
        """log-sum-exp over the ranks."""
        ...

    def everywhere(self, values: Tensor) -> Tensor:
        """[J] values of the keys of every rank as [L], in the order of the packed sequence."""
        ...


@dataclass(frozen=True)
class AttentionSignals:
    """Of one attention layer, this rank's heads.

    Attributes:
        q: [T, H, E] queries of the layout's query tokens as they enter the dot product.
        k: [L, K, E] keys; K divides H, head h reads key head h * K // H. [J, K, E] if others hold the rest.
        held: which keys these are; None: all.
    """

    q: Tensor
    k: Tensor
    held: HeldKeys | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, layout: TokenLayout) -> AttentionSignals:
        """From q [L, H, E] and k [L, K, E] of all tokens."""
        return AttentionSignals(q.index_select(0, layout.query_index), k)


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
