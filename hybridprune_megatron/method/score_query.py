"""The query-conditioned score: how much the question's tokens read from each visual token in one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from hybridprune_megatron.bounds import OneOf
from hybridprune_megatron.checks import fail
from hybridprune_megatron.layers.operations import Cost
from hybridprune_megatron.method.scorer import FP32, KEY, Scorer, ScoreSizes

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.signals import ScoredSample


@dataclass(frozen=True)
class QueryScorer(Scorer):
    """Attention: softmax mass from the question. Mamba: implicit attention from the question.

    The mean over the query rows comes first, pooling over heads second. The formulas are in ``query_formula``.

    Attributes:
        query_rows: text rows that score; question (all its tokens) or last (its last token, FastV's row).
        attention_pooling: scores of an attention layer over its heads; mean or max.
        attention_causal: false lets the question score visual tokens after it, for questions before the video.
        mamba_decay: keeps the decay of the Mamba state in the score, which favours frames close to the question.
        mamba_dt: keeps the step size dt of a visual token in the Mamba score.
        mamba_function: applied to implicit attention before it is averaged; identity, abs, relu or softmax.
        mamba_contrast: a Mamba head's score becomes its distance, in standard deviations, from the head's mean over the
            sample's visual tokens.
        mamba_pooling: scores of a Mamba layer over its heads; mean, max_groups (mean within a group) or max_heads.
    """

    name: ClassVar[str] = "query"
    before: ClassVar[Mapping[str, Any]] = {"mamba_contrast": False}
    query_rows: Annotated[str, OneOf("question", "last")] = "question"
    attention_pooling: Annotated[str, OneOf("mean", "max")] = "mean"
    attention_causal: bool = True
    mamba_decay: bool = False
    mamba_dt: bool = True
    mamba_function: Annotated[str, OneOf("identity", "abs", "relu", "softmax")] = "identity"
    mamba_contrast: bool = True
    mamba_pooling: Annotated[str, OneOf("mean", "max_groups", "max_heads")] = "mean"

    def can_score(self, kind: str) -> bool:
        return kind in ("attention", "mamba")

    def pooling(self, kind: str) -> str:
        return self.attention_pooling if kind == "attention" else self.mamba_pooling

    def rows(self, question: int) -> int:
        return min(1, question) if self.query_rows == "last" else question

    def values(
        self, signals: Any, samples: Sequence[ScoredSample], layer: int
    ) -> Iterator[tuple[Tensor | slice, Tensor]]:
        from hybridprune_megatron.method.query_formula import attention_mass, contrasted, implicit_attention

        if signals.kind == "attention":
            # A row without a visual sample asks for nothing; see ``attention_mass``.
            yield from attention_mass(signals, samples, self.attention_causal)
            return
        how = (self.mamba_decay, self.mamba_dt, self.mamba_function)
        for sample in samples:
            start, blocks = sample.place.start, partial(implicit_attention, signals, sample, *how)
            for block in contrasted(blocks) if self.mamba_contrast else blocks():
                yield slice(start, start + len(block)), block
                start += len(block)

    def native_scores(self, signals: Any, layout: TokenLayout, samples: Sequence[ScoredSample]) -> Tensor | None:
        from hybridprune_megatron.method.operators import attention_scores, mamba_scores
        from hybridprune_megatron.ops.native import native

        if signals.kind == "attention":
            ops = native(signals.q, signals.k)
            if ops is None:
                return None
            return attention_scores(ops, signals, layout, samples, self.attention_causal, self.attention_pooling)
        ops = native(signals.B, signals.C)
        if ops is None:
            return None
        if self.mamba_contrast and not self._one_pass:
            return None
        how = (self.mamba_decay, self.mamba_dt, self.mamba_function, self.mamba_contrast, self.mamba_pooling)
        return mamba_scores(ops, signals, layout, samples, *how)

    def check_heads(self, kind: str, groups: int, context: int) -> None:
        if kind == "mamba" and self.mamba_pooling == "max_groups" and groups < context:
            raise fail(
                f"{KEY}.mamba_pooling",
                "max_groups",
                f"needs whole groups on a rank: {groups} are shared by parallel.context={context} ranks",
                f"set {KEY}.mamba_pooling=mean or max_heads, or lower parallel.context",
            )

    def costs(self, kind: str, sizes: ScoreSizes) -> Mapping[str, Cost]:
        rows = self.rows(sizes.question)
        if kind == "attention":
            return attention_score(sizes, rows)
        passes = 2 if self.mamba_contrast else 1
        if self._one_pass:
            found = decay_free_score(sizes, rows)
        else:
            found = implicit_attention_score(sizes, rows, self.mamba_function == "softmax", self.mamba_decay)
        return {name: cost.times(passes) for name, cost in found.items()}

    @property
    def _one_pass(self) -> bool:
        """Whether the mean of C comes first, so that no product of a row with a token is needed."""
        return self.mamba_function == "identity" and not self.mamba_decay


def attention_score(sizes: ScoreSizes, rows: int) -> Mapping[str, Cost]:
    """Softmax mass of the question: one pass over all keys for the row sums, one over the visual keys for the columns.

    Two passes are what keeps the memory at O(T + L); each multiplies T rows with its keys in every head.
    """
    passes = {}
    for name, columns in (("row sums", sizes.tokens), ("columns", sizes.visual)):
        flops = 2 * rows * columns * sizes.heads * sizes.channels
        logits = rows * columns * sizes.heads
        passes[name] = Cost(flops, flops, sizes.width * columns * sizes.groups * sizes.channels + 2 * FP32 * logits)
    return passes


def decay_free_score(sizes: ScoreSizes, rows: int) -> Mapping[str, Cost]:
    """``dt_j B_j . Cbar``: one pass over B and dt. Plain torch multiplies and sums, so a profiler sees no product."""
    numbers = sizes.groups * sizes.channels
    read = sizes.width * (sizes.visual + rows) * numbers + FP32 * sizes.visual * (sizes.heads + 1)
    return {"score": Cost(2 * sizes.visual * numbers, 0, read)}


def implicit_attention_score(sizes: ScoreSizes, rows: int, softmax: bool, decay: bool) -> Mapping[str, Cost]:
    """``f(C_i . B_j dt_j [exp(a_i - a_j)])``: T x V products per group; with decay or softmax T x V numbers per head.

    Args:
        sizes: of the layer.
        rows: T.
        softmax: f is the softmax, which takes two passes, as in attention.
        decay: whether the bracket is there; numbers are float64 then.
    """
    passes = 2 if softmax else 1
    flops = 2 * rows * sizes.visual * sizes.groups * sizes.channels * passes
    numbers = rows * sizes.visual * (sizes.groups + (sizes.heads if softmax or decay else 0)) * passes
    read = sizes.width * (sizes.visual * passes + rows) * sizes.groups * sizes.channels
    return {"score": Cost(flops, flops, read + 2 * (2 * FP32 if decay else FP32) * numbers)}
