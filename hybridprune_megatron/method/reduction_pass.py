"""Dropping in one forward pass: how many tokens enter every layer, whom a layer asks, and the step after it.

Built once per forward pass from what is dropped, the packed sequence and its alignment. The training stack, the export,
the shapes that pipeline stages exchange and the benchmark all walk this object, so none of them counts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hybridprune_megatron.method.counts import packed_counts
from hybridprune_megatron.method.layout import SampleLayout, TokenLayout
from hybridprune_megatron.method.local_choice import Quotas, competing_runs, local_quotas
from hybridprune_megatron.method.merge import Ranking, take_merged
from hybridprune_megatron.method.plan import Plan, select
from hybridprune_megatron.method.reduction import Reduction, at_least
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.smoothing import smoothed, with_frame


class Rows(Protocol):
    """Where the rows of a packed sequence lie: all here, or parts of it on several ranks."""

    def whole(self, hidden: Tensor) -> Tensor:
        """[L, ...] all rows, from those that are here."""
        ...

    def part(self, whole: Tensor) -> Tensor:
        """The reverse of ``whole``."""
        ...

    def taken(self, hidden: Tensor, plan: Plan, length: int, stay: bool) -> Tensor:
        """This rank's part of the rows that a plan keeps.

        Args:
            hidden: the rows that are here.
            plan: over all of them.
            length: L before it.
            stay: whether every rank keeps as many of its own rows as the others, so that none has to move.
        """
        ...


class LocalRows:
    """All rows are here."""

    def whole(self, hidden: Tensor) -> Tensor:
        """See ``Rows``."""
        return hidden

    def part(self, whole: Tensor) -> Tensor:
        """See ``Rows``."""
        return whole

    def taken(self, hidden: Tensor, plan: Plan, length: int, stay: bool) -> Tensor:
        """See ``Rows``."""
        return plan.take(hidden)


HERE = LocalRows()
#: One layer: (0-based index, hidden states, layout, who wants scores) -> hidden states, scores.
RunLayer = Callable[[int, Tensor, TokenLayout, Scorer | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ReductionPass:
    """Dropping in one forward pass over one packed sequence.

    Attributes:
        reduction: what to drop; None: nothing is.
        counts: for every layer the S numbers of visual tokens that enter it.
        quotas: for every layer how many of them every chunk of the sequence holds, where tokens compete within chunks;
            None: they compete within samples.
    """

    reduction: Reduction | None
    counts: tuple[tuple[int, ...], ...]
    quotas: tuple[Quotas, ...] | None = None

    @staticmethod
    def of(
        reduction: Reduction | None,
        layout: TokenLayout,
        multiple_of: int = 1,
        by_sample: Sequence[Sequence[float]] | None = None,
    ) -> ReductionPass:
        """Counts the tokens of every layer.

        Args:
            reduction: what to drop; None: nothing.
            layout: the packed sequence before any reduction.
            multiple_of: what the packed length must divide by in every layer, besides the reduction's own setting.
            by_sample: a retention of its own for every sample; None: the reduction's for all.

        Raises:
            ValueError: the packed length before any reduction does not divide.
        """
        if reduction is None:
            return ReductionPass(None, ())
        visual = layout.original_visual_counts
        retentions = (
            [tuple(each) for each in by_sample] if by_sample is not None else [reduction.retention] * len(visual)
        )
        if reduction.front is not None:
            fewest = reduction.front.fewest(layout)
            retentions = [at_least(*each) for each in zip(retentions, fewest, visual, strict=True)]
        num_text = layout.num_tokens - sum(layout.visual_counts)
        alignment = math.lcm(multiple_of, reduction.select.multiple_of)
        counts = packed_counts(retentions, visual, num_text, reduction.select.min_tokens, alignment)
        return ReductionPass(reduction, tuple(counts))

    def within_chunks(self, samples: Sequence[SampleLayout], num_chunks: int, multiple_of: int) -> ReductionPass:
        """The same, with tokens that compete within chunks of the sequence, of which every one drops as many.

        Args:
            samples: the packed samples before any reduction.
            num_chunks: of one length.
            multiple_of: as for ``of``.
        """
        assert self.reduction is not None, "nothing is dropped"
        alignment = math.lcm(multiple_of, self.reduction.select.multiple_of)
        quotas = local_quotas(samples, self.counts, num_chunks, alignment)
        counts = tuple(tuple(map(sum, zip(*each))) for each in quotas)
        return replace(self, counts=counts, quotas=quotas)

    @property
    def dt_filter(self) -> float | None:
        """See ``Reduction``."""
        return None if self.reduction is None else self.reduction.dt_filter

    def entering(self, layer: int, layout: TokenLayout) -> tuple[int, ...]:
        """Visual tokens of every sample that enter a layer.

        Args:
            layer: 0-based, in the whole model.
            layout: the packed sequence before any reduction.
        """
        return layout.original_visual_counts if self.reduction is None else self.counts[layer]

    def drops_after(self, layer: int) -> bool:
        """Whether fewer tokens leave a layer than enter it."""
        return layer + 1 < len(self.counts) and self.counts[layer + 1] != self.counts[layer]

    def asked_by(self, layer: int) -> Scorer | None:
        """Who wants the scores of a layer's mixer; None: nobody."""
        if self.reduction is None or not self.drops_after(layer):
            return None
        return self.reduction.scorer

    def enter(self, hidden: Tensor, layout: TokenLayout, pixels: Tensor | None) -> tuple[Tensor, TokenLayout]:
        """What enters layer 0: everything, or what the front passes on.

        Args:
            hidden: [L, ...] embeddings before any reduction, all tokens and channels.
            layout: the packed sequence before any reduction.
            pixels: [F, 3, height, width] the frames in the order of the layout; None: there are only features of them.

        Returns:
            [L', ...], and the layout of what is left.
        """
        front = None if self.reduction is None else self.reduction.front
        if front is None or not sum(layout.visual_counts):
            return hidden, layout
        counts = self.counts[0]
        with torch.no_grad():
            features = hidden.index_select(0, layout.visual_index).flatten(1)
            ranking = front.rank(features, pixels, layout, counts)
            plan = select(ranking.scores, layout, counts)
        if ranking.partner is not None:
            return take_merged(hidden, layout, plan, ranking.partner), plan.layout
        return plan.take(hidden), plan.layout

    def walk(
        self,
        layers: Iterable[int],
        hidden: Tensor,
        layout: TokenLayout,
        run: RunLayer,
        rows: Rows = HERE,
        trace: list[TokenLayout] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """Runs layers, and drops after those that drop.

        Args:
            layers: 0-based, in the whole model, in order.
            hidden: what enters the first of them: rows that are here.
            layout: the tokens that enter it.
            run: one layer.
            rows: where the rows lie.
            trace: gets the layout that enters every layer.

        Returns:
            Hidden states of the tokens that are left, and their layout.
        """
        for layer in layers:
            if trace is not None:
                trace.append(layout)
            hidden, scores = run(layer, hidden, layout, self.asked_by(layer))
            if self.drops_after(layer):
                hidden, layout = self.step(layer, hidden, layout, scores, rows)
        return hidden, layout

    def step(
        self, layer: int, hidden: Tensor, layout: TokenLayout, scores: Tensor | None, rows: Rows = HERE
    ) -> tuple[Tensor, TokenLayout]:
        """The drop after a layer: from scores to the tokens that are left.

        Args:
            layer: 0-based, in the whole model.
            hidden: [L, ...] after the layer, or the rows that are here.
            layout: the packed sequence that left the layer.
            scores: float32 [V] of the layer's mixer over all heads; None where the output is ranked.
            rows: where the rows lie.

        Returns:
            As ``hidden``, and the layout of what is left.
        """
        assert self.reduction is not None, "nothing is dropped"
        # An exported model's layers may lie on several devices.
        counts, layout = self.counts[layer + 1], layout.to(hidden.device)
        if not self.reduction.looks_at_rows:
            plan = self._plan(layer, _scored(scores), layout)
            return rows.taken(hidden, plan, layout.num_tokens, self.quotas is not None), plan.layout
        whole, output_scorer = rows.whole(hidden), self.reduction.output_scorer
        with torch.no_grad():
            if output_scorer is not None:
                ranking = output_scorer.rank(whole.flatten(1), layout, counts)
            else:
                ranking = Ranking(_scored(scores))
            plan = self._plan(layer, ranking.scores, layout)
        if self.reduction.select.dropped == "merge":
            return rows.part(take_merged(whole, layout, plan, ranking.partner)), plan.layout
        return rows.part(plan.take(whole)), plan.layout

    @torch.no_grad()
    def _plan(self, layer: int, scores: Tensor, layout: TokenLayout) -> Plan:
        """Which tokens stay."""
        assert self.reduction is not None, "nothing is dropped"
        how, counts = self.reduction.select, self.counts[layer + 1]
        scores = with_frame(smoothed(scores, layout, how.smoothing_frames), layout, how.frame_share)
        runs = None if self.quotas is None else competing_runs(self.quotas[layer], self.quotas[layer + 1])
        return select(scores, layout, counts, how.min_tokens_per_frame, runs)


def _scored(scores: Tensor | None) -> Tensor:
    assert scores is not None, "a layer was asked to score and did not"
    return scores
