"""What a layer has computed anyway and a score may use, and the blocks in which it is looked at.

Shape letters: L tokens, V visual tokens, T query tokens, J keys or tokens of a block, H heads, K key-value heads,
E head width, G groups, N state size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import TokenLayout

# Keys (or visual tokens) per block: memory is O(T * H * block), never L x L.
BLOCK = 1024


@dataclass(frozen=True)
class ScoredSample:
    """One sample of a packed sequence that shows something.

    Attributes:
        visual: int64 [V] positions of its visual tokens in the packed sequence, rising.
        place: which of the packed sequence's visual tokens they are.
        queries: which of the layout's query tokens score.
        rows: int64 [T] their positions.
        first: its first position (host).
        last: the position after its last (host).
    """

    visual: Tensor
    place: slice
    queries: slice
    rows: Tensor
    first: int
    last: int

    def after(self, columns: Tensor) -> Tensor:
        """bool [T, J]: which of some positions lie after which row."""
        return columns > self.rows.unsqueeze(1)

    def log_decay(self, signals: MambaSignals) -> Tensor:
        """float64 [tokens of the sample, H] running sum of dt A from its start; differences of it are what counts."""
        return torch.cumsum(signals.dt[self.first : self.last].double() * signals.A.double(), 0)


def scored_samples(
    layout: TokenLayout, rows: Callable[[int], int] = int, need_question: bool = True
) -> list[ScoredSample]:
    """The samples that show something, in order.

    Args:
        layout: the packed sequence.
        rows: from the number of a sample's query tokens to how many of them, the last ones, score.
        need_question: whether a sample without a question cannot be scored.

    Raises:
        ValueError: a sample shows something and asks nothing.
    """
    samples = []
    starts, query_starts, visual_starts = layout.sample_starts(), layout.query_starts(), layout.visual_starts()
    for sample, (visual_count, query_count) in enumerate(zip(layout.visual_counts, layout.query_counts)):
        if not visual_count:
            continue
        if not query_count and need_question:
            raise ValueError(
                f"sample {sample} of the packed sequence has {visual_count} visual tokens and no question to score "
                "them by: give its first user turn some text, or choose reduction=uniform"
            )
        place = slice(visual_starts[sample], visual_starts[sample + 1])
        stop = query_starts[sample + 1]
        queries = slice(stop - rows(query_count), stop)
        visual, asking = layout.visual_index[place], layout.query_index[queries]
        samples.append(ScoredSample(visual, place, queries, asking, starts[sample], starts[sample + 1]))
    return samples


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
class AttentionBlock:
    """Some keys of one sample in an attention layer, this rank's heads.

    Attributes:
        layer: 0-based, in the whole model.
        q: [T, H, E] queries of the sample's query tokens that score.
        k: [J, K, E] keys.
        positions: int64 [J] where the keys stand in the packed sequence.
        after: bool [T, J] whether a key lies after a query.
        place: where the block's scores go.
    """

    layer: int
    q: Tensor
    k: Tensor
    positions: Tensor
    after: Tensor
    place: Tensor | slice


@dataclass(frozen=True)
class MambaBlock:
    """Some visual tokens of one sample in a Mamba-2 layer, this rank's heads.

    Attributes:
        layer: 0-based, in the whole model.
        B: [J, G, N] their input projections.
        C: [T, G, N] output projections of the sample's query tokens that score.
        dt: float32 [J, H] their step sizes.
        A: float32 [H].
        positions: int64 [J] where they stand in the packed sequence.
        place: where the block's scores go.
    """

    layer: int
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    positions: Tensor
    place: Tensor | slice


class Signals(Protocol):
    """What one kind of layer gives a score: a class per kind, and a block of it."""

    kind: ClassVar[str]

    def blocks(self, sample: ScoredSample, layer: int) -> Iterator[AttentionBlock | MambaBlock]:
        """The sample in blocks."""
        ...

    def empty(self, layout: TokenLayout) -> Tensor:
        """float32 zeros that the blocks' scores go into."""
        ...

    def of_visual(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """float32 [V] in the order of ``layout.visual_index`` from what the blocks were filled into."""
        ...


@dataclass(frozen=True)
class AttentionSignals:
    """Of one attention layer, this rank's heads.

    Attributes:
        q: [T, H, E] queries of the layout's query tokens as they enter the dot product.
        k: [L, K, E] keys; K divides H, head h reads key head h * K // H. [J, K, E] if others hold the rest.
        held: which keys these are; None: all.
    """

    kind: ClassVar[str] = "attention"
    q: Tensor
    k: Tensor
    held: HeldKeys | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, layout: TokenLayout) -> AttentionSignals:
        """From q [L, H, E] and k [L, K, E] of all tokens."""
        return AttentionSignals(q.index_select(0, layout.query_index), k)

    def scored_keys(self, sample: ScoredSample) -> Sequence[Tensor]:
        """Rows of k in blocks: the visual ones, or all that are here, whose number the host knows."""
        return sample.visual.split(BLOCK) if self.held is None else self.keys(sample)

    def keys(self, sample: ScoredSample) -> list[Tensor]:
        """All rows of k of a sample that are here, in blocks."""
        rows = [slice(sample.first, sample.last)] if self.held is None else self.held.rows(sample.first, sample.last)
        return [
            keys for each in rows for keys in torch.arange(each.start, each.stop, device=self.k.device).split(BLOCK)
        ]

    def positions(self, keys: Tensor) -> Tensor:
        """Where rows of k stand in the packed sequence."""
        return keys if self.held is None else self.held.positions[keys]

    def blocks(self, sample: ScoredSample, layer: int) -> Iterator[AttentionBlock]:
        """See ``Signals``."""
        for keys in self.scored_keys(sample):
            positions = self.positions(keys)
            yield AttentionBlock(layer, self.q[sample.queries], self.k[keys], positions, sample.after(positions), keys)

    def empty(self, layout: TokenLayout) -> Tensor:
        """See ``Signals``: a score for every key that is here."""
        return self.k.new_zeros(len(self.k), dtype=torch.float32)

    def of_visual(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """See ``Signals``."""
        return (scores if self.held is None else self.held.everywhere(scores))[layout.visual_index]


@dataclass(frozen=True)
class MambaSignals:
    """Of one Mamba-2 layer, this rank's heads.

    Attributes:
        B: [L, G, N] input projections after convolution and SiLU.
        C: [L, G, N] output projections after convolution and SiLU.
        dt: float32 [L, H] step sizes after softplus; head h reads group h * G // H.
        A: float32 [H] decay rates, below 0.
    """

    kind: ClassVar[str] = "mamba"
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor

    def blocks(self, sample: ScoredSample, layer: int) -> Iterator[MambaBlock]:
        """See ``Signals``."""
        for start in range(0, len(sample.visual), BLOCK):
            tokens = sample.visual[start : start + BLOCK]
            place = slice(sample.place.start + start, sample.place.start + start + len(tokens))
            yield MambaBlock(layer, self.B[tokens], self.C[sample.rows], self.dt[tokens], self.A, tokens, place)

    def empty(self, layout: TokenLayout) -> Tensor:
        """See ``Signals``: a score for every visual token."""
        return self.B.new_zeros(len(layout.visual_index), dtype=torch.float32)

    def of_visual(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """See ``Signals``: they are there."""
        return scores
