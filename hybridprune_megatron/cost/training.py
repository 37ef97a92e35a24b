"""Operations of a training step, forward and backward, from the same pieces as those of a prefill.

Counted is what a step needs, not what is computed again to save memory (``trainer.recompute``). Backward takes twice
the forward pass of a part that learns, once that of a part that only passes gradients on (its weightless products, of
attention and scan, twice: both of their inputs get a gradient), and nothing of what lies before all that learns. Scores
and a teacher have no backward pass. Left out: the adapters' own products, and what ranks do more than once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET
from hybridprune_megatron.cost.parameters import adapter_parameters
from hybridprune_megatron.cost.prefill import head_cost, layer_operations
from hybridprune_megatron.cost.scoring import drop_operations, front_operations, scoring_operations
from hybridprune_megatron.cost.target import device_named
from hybridprune_megatron.cost.vision import projector_cost, tower_cost
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import WIDTH, Cost, sum_costs
from hybridprune_megatron.method.counts import PackSizes, packed_counts
from hybridprune_megatron.method.reduction import at_least
from hybridprune_megatron.method.schedule import layer_symbols

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

Counts = list[tuple[int, ...]]


class StepCost:
    """The cost model of one configuration's training.

    Args:
        cfg: the run's configuration.
    """

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._model = cfg, cfg.model
        self._symbols = layer_symbols(cfg.model.hybrid_pattern)
        self._width = WIDTH[cfg.trainer.precision]
        learns, lora = cfg.model.trainable, cfg.tuning.lora
        # Under adapters, a part passes gradients on and keeps its weights.
        adapted = lora.rank and any(adapter_parameters(cfg.model, symbol, lora).total for symbol in set(self._symbols))
        self._language_learns = learns.language and not adapted
        self._projector_learns = learns.projector and not (lora.rank and PROJECTOR_TARGET in lora.targets)

    def operations(self, sizes: PackSizes) -> int:
        """Operations of forward and backward over one packed sequence, with those of a teacher if there is one.

        Args:
            sizes: of the packed sequence.
        """
        entering = self._entering(sizes)
        done = self._layers(sizes, entering, trained=True) + self._reduction(sizes, entering)
        done += self._frames(sizes, trained=True) + self._head(sizes, entering[-1], trained=True)
        if self._cfg.tuning.distillation.weight:
            every = [sizes.visual] * len(self._symbols)
            done += self._layers(sizes, every, trained=False) + self._frames(sizes, trained=False)
            done += self._head(sizes, sizes.visual, trained=False)
        return done

    def peak(self, device: str) -> float | None:
        """Operations a second that a device can do at most in the run's precision; None: not known.

        Args:
            device: its name, as CUDA gives it.
        """
        known = device_named(device)
        # Linears in FP8 and everything else in bf16 share no peak.
        return None if known is None or self._cfg.fp8.recipe is not None else known.flops[self._cfg.trainer.precision]

    def _entering(self, sizes: PackSizes) -> Counts:
        """Visual tokens of every sample that enter every layer, as ``ReductionPass`` counts them."""
        cfg, reduction = self._cfg, self._cfg.reduction
        if not cfg.drops and sizes.retentions is None:
            return [sizes.visual] * len(self._symbols)
        retentions = sizes.retentions or (cfg.retention_by_layer,) * len(sizes.visual)
        vision = self._model.vision
        if reduction.front.keeps_first_frames and vision is not None:
            first = [min(vision.tokens_per_frame, visual) for visual in sizes.visual]
            retentions = tuple(at_least(*each) for each in zip(retentions, first, sizes.visual))
        fewest = reduction.select.min_tokens
        return packed_counts(retentions, sizes.visual, sum(sizes.text), fewest, cfg.length_multiple)

    def _layers(self, sizes: PackSizes, entering: Counts, trained: bool) -> int:
        known: dict[tuple[str, tuple[int, ...]], int] = {}
        total = 0
        for symbol, visual in zip(self._symbols, entering):
            if (symbol, visual) not in known:
                lengths = [count + text for count, text in zip(visual, sizes.text)]
                found = layer_operations(self._model, symbol, lengths, self._width)
                known[symbol, visual] = self._times(found, KINDS[symbol].core, trained)
            total += known[symbol, visual]
        return total

    def _times(self, operations: Mapping[str, Cost], weightless: frozenset[str], trained: bool) -> int:
        flops = sum_costs(operations.values()).flops
        if not trained:
            return flops
        alone = sum(cost.flops for name, cost in operations.items() if name in weightless)
        return 3 * alone + (3 if self._language_learns else 2) * (flops - alone)

    def _reduction(self, sizes: PackSizes, entering: Counts) -> int:
        """Scores, ranking and the reduction before the first layer, sample by sample."""
        model, reduction, width = self._model, self._cfg.reduction, self._width
        total = 0
        for sample, (visual, text, question) in enumerate(zip(sizes.visual, sizes.text, sizes.question)):
            counts = [layer[sample] for layer in entering]
            pieces = [front_operations(model, reduction, visual, counts[0], width)]
            for symbol, count, left in zip(self._symbols, counts, counts[1:]):
                if left < count:
                    pieces.append(scoring_operations(model, reduction, symbol, count + text, count, question, width))
                    pieces.append(drop_operations(model, reduction, count, left, text, width))
            total += sum(cost.flops for piece in pieces for cost in piece.values())
        return total

    def _frames(self, sizes: PackSizes, trained: bool) -> int:
        vision, learns = self._model.vision, self._model.trainable
        if vision is None or not sizes.frames:
            return 0
        tower = tower_cost(vision, sizes.encoded, self._width).flops
        projector = projector_cost(vision, self._model.hidden_size, sizes.frames, self._width).flops
        if not trained:
            return tower + projector
        # The projector is the first part to learn unless the tower does, whose gradients pass through it.
        adapted = learns.projector and not self._projector_learns
        backward = 2 if self._projector_learns else int(adapted or learns.vision)
        return tower * (3 if learns.vision else 1) + projector * (1 + backward)

    def _head(self, sizes: PackSizes, left: tuple[int, ...], trained: bool) -> int:
        cost = head_cost(self._model, sum(left) + sum(sizes.text), sizes.loss_rows, self._width).flops
        return cost * ((3 if self._language_learns else 2) if trained else 1)
