"""What a forward pass of the exported model returns.

Shape letters: B samples, L columns of a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridprune_megatron.method.layout import TokenLayout


@dataclass(frozen=True)
class ReductionStatistics:
    """Which visual tokens entered which layer.

    Attributes:
        positions: for every layer and sample int64, rising: positions within the sample before any reduction, padding
            not counted.
        visual_counts: for every sample its visual tokens before any reduction.
    """

    positions: tuple[tuple[Tensor, ...], ...]
    visual_counts: tuple[int, ...]

    @staticmethod
    def of(layouts: Sequence[TokenLayout]) -> ReductionStatistics:
        """Reads the layouts that entered the layers."""
        kept = (each.position[each.visual_index].split(list(each.visual_counts)) for each in layouts)
        return ReductionStatistics(tuple(kept), layouts[0].original_visual_counts)

    def counts(self) -> list[list[int]]:
        """Visual tokens of every layer and sample."""
        return [[len(sample) for sample in layer] for layer in self.positions]

    def budgets(self) -> list[float | None]:
        """Mean share of every sample's visual tokens over all layers, as it came out; None where it has none."""
        totals = map(sum, zip(*self.counts()))
        every = [len(self.positions) * count for count in self.visual_counts]
        return [total / most if most else None for total, most in zip(totals, every)]


@dataclass
class HybridPruneOutput(CausalLMOutputWithPast):
    """Output of ``HybridPruneForCausalLM``.

    Attributes:
        loss: mean over the labels whose token in front was not dropped.
        logits: [B, kept columns, vocabulary]; NaN where a token is padding or was dropped (text never is).
        past_key_values: with ``use_cache`` the ``HybridCache``. transformers 5.24 calls it ``cache``, and reads this
            name too.
        hidden_states, attentions: always None.
        reduction: with ``output_reduction``, of a prefill; the caches carry it too.
    """

    reduction: ReductionStatistics | None = None
