"""What a layout of the GPUs costs: memory, bytes on the wire and time of a step, with and without reduction."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.cost.memory import GIB, Memory, Packed, training_memory
from hybridprune_megatron.cost.prefill import Prefill, Prompt, prefill_cost
from hybridprune_megatron.cost.target import TargetConfig
from hybridprune_megatron.method.schedule import Listed, cut_pattern, even_edges, layer_symbols
from studies.scaling.step_time import Clock, StepTime, step_time

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from studies.scaling.assumptions import Assumptions

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """How a copy of the model is split; what is left of the GPUs is data parallel.

    Attributes:
        tensor: GPUs that split every layer.
        context: GPUs that split the sequence.
        pipeline: GPUs that split the depth.
    """

    tensor: int
    context: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of one copy."""
        return self.tensor * self.context * self.pipeline

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in zip(("tp", "cp", "pp"), vars(self).values()) if size > 1)


# Tensor parallel within a node, context parallel next, pipeline where memory asks for it.
LAYOUTS = (
    Layout(4),
    Layout(8),
    Layout(4, 2),
    Layout(2, 4),
    Layout(4, 1, 2),
    Layout(2, 2, 2),
    Layout(8, 2),
    Layout(4, 4),
    Layout(2, 8),
    Layout(8, 1, 2),
    Layout(4, 2, 2),
    Layout(8, 4),
)


def filled(cfg: Config) -> tuple[Config, Prompt]:
    """A sample that fills ``data.sequence_length`` with one video, and the configuration that lets it be so long.

    Raises:
        ConfigError: a model without a vision tower, or no room for a frame.
    """
    target, vision, length = TargetConfig(), cfg.model.vision, cfg.data.sequence_length
    if vision is None:
        reason = "a model without a vision tower has no frames to fill a sequence with"
        raise fail("model.vision", None, reason, "choose a model with a tower, e.g. model=nemotron_nano_12b_v2_vl")
    frames = (length - target.text_tokens) // (vision.tokens_per_frame + target.frame_text_tokens)
    if frames < 1:
        raise fail("data.sequence_length", length, "leaves no room for a frame and its text", "raise it")
    visual = frames * vision.tokens_per_frame
    data = replace(cfg.data, sampling="fps", max_frames=frames)
    return replace(cfg, data=data), Prompt(visual, length - visual, target.question_tokens, frames)


@dataclass(frozen=True)
class Workload:
    """What is trained, with one reduction.

    Attributes:
        cfg: model, reduction and what learns; parallel and trainer are set by a layout.
        prefill: the operations of one sequence.
        answer_tokens: tokens of it with a loss.
    """

    cfg: Config
    prefill: Prefill
    answer_tokens: int

    @staticmethod
    def of(cfg: Config, budget: float) -> Workload:
        """One sequence a micro-batch, filled by one sample, under a budget (1 = no reduction)."""
        cfg, prompt = filled(cfg)
        retention = cfg.retention_at(budget)
        # Written out, so that the schedule is not solved again with every layout.
        written = replace(cfg.reduction, budget=budget, schedule=Listed(retention))
        reduced = replace(cfg, reduction=written)
        prefill = prefill_cost(cfg.model, reduced.reduction, retention, prompt, cfg.trainer.precision)
        return Workload(reduced, prefill, TargetConfig().answer_tokens)

    @property
    def packed(self) -> Packed:
        """The sequence, for the memory."""
        prompt, visual = self.prefill.prompt, tuple(row.visual for row in self.prefill.rows)
        return Packed(1, visual, prompt.text, prompt.frames, self.answer_tokens)


@dataclass(frozen=True)
class Estimate:
    """A layout on a number of GPUs.

    Attributes:
        cfg: the whole configuration, which a run would accept.
        memory: of the fullest rank.
        fits: whether it does.
        step: time and bytes of an optimizer step.
    """

    cfg: Config
    memory: Memory
    fits: bool
    step: StepTime

    @property
    def layout(self) -> Layout:
        """Its split."""
        parallel = self.cfg.parallel
        return Layout(parallel.tensor, parallel.context, parallel.pipeline)

    @property
    def tokens_per_second(self) -> float:
        """Tokens before any reduction, a second and GPU."""
        trainer = self.cfg.trainer
        tokens = trainer.global_batch_size * self.cfg.data.sequence_length
        return tokens / self.step.seconds / (trainer.num_nodes * trainer.devices)


class Scaling:
    """Costs of all layouts of one workload; what was counted once is kept.

    Args:
        workload: what is trained.
        assumptions: on what machines.
        batch: packed sequences an optimizer step.
    """

    def __init__(self, workload: Workload, assumptions: Assumptions, batch: int) -> None:
        self.workload, self.assumptions, self.batch = workload, assumptions, batch
        self._memories: dict[tuple[Layout, int, str, str], tuple[Config, Memory]] = {}
        self._clocks: dict[tuple[int, int, int, str], Clock] = {}
        self._best: dict[tuple[Layout, int], Estimate] = {}

    def under(self, **changes: Any) -> Scaling:
        """The same under other assumptions."""
        other = Scaling(self.workload, replace(self.assumptions, **changes), self.batch)
        # Assumptions decide whether memory suffices, not how much is needed.
        other._memories = self._memories
        return other

    def configure(self, layout: Layout, gpus: int, recompute: str, pattern: str) -> Config:
        """The configuration of a layout.

        Args:
            layout: the split.
            gpus: all GPUs.
            recompute: none, selective or full.
            pattern: layers with stage cuts.

        Raises:
            ConfigError: it cannot be run, in the words that a run would refuse it with.
        """
        cfg, nodes = self.workload.cfg, max(1, gpus // GPUS_PER_NODE)
        parallel = replace(
            cfg.parallel,
            tensor=layout.tensor,
            context=layout.context,
            pipeline=layout.pipeline,
            sequence_parallel=layout.tensor > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        trainer = replace(
            cfg.trainer,
            num_nodes=nodes,
            devices=gpus // nodes,
            global_batch_size=self.batch,
            recompute=recompute,
        )
        model = replace(cfg.model, hybrid_pattern=pattern)
        return replace(cfg, model=model, parallel=parallel, trainer=trainer)

    def estimate(self, layout: Layout, gpus: int, recompute: str, pattern: str) -> Estimate:
        """Memory, bytes and time of one configuration; arguments as for ``configure``."""
        key = (layout, gpus, recompute, pattern)
        if key not in self._memories:
            cfg = self.configure(*key)
            self._memories[key] = cfg, training_memory(cfg, self.workload.packed)
        cfg, memory = self._memories[key]
        limit = self.assumptions.usable_memory * self.assumptions.memory_gib * GIB
        return Estimate(cfg, memory, memory.total <= limit, step_time(cfg, self._clock(cfg)))

    def best(self, layout: Layout, gpus: int) -> Estimate:
        """The fastest way to run a layout that fits, over recomputation and stage cuts; if none fits, the smallest.

        Raises:
            ConfigError: the layout cannot be run.
        """
        if (layout, gpus) not in self._best:
            found = [
                self.estimate(layout, gpus, recompute, pattern)
                for recompute in ("none", "selective", "full")
                for pattern in self._patterns(layout, gpus, recompute)
            ]
            fitting = [each for each in found if each.fits]
            chosen = min(fitting, key=lambda each: each.step.seconds) if fitting else None
            self._best[layout, gpus] = chosen or min(found, key=lambda each: each.memory.total)
        return self._best[layout, gpus]

    def fastest(self, gpus: int) -> Estimate:
        """The fastest layout that fits.

        Raises:
            ValueError: none does.
        """
        found = []
        for layout in LAYOUTS:
            # Refused ones are for the table.
            with suppress(ConfigError):
                found.append(self.best(layout, gpus))
        fitting = [each for each in found if each.fits]
        if not fitting:
            raise ValueError(f"{gpus} GPUs, {self.batch} sequences a step: no layout fits; raise GPUs or usable_memory")
        return min(fitting, key=lambda each: each.step.seconds)

    def _clock(self, cfg: Config) -> Clock:
        """Pieces of a micro-batch, timed once for all stage cuts and numbers of GPUs."""
        key = (cfg.parallel.tensor, cfg.parallel.context, cfg.trainer.devices, cfg.trainer.recompute)
        if key not in self._clocks:
            self._clocks[key] = Clock(cfg, self.workload.prefill, self.assumptions)
        return self._clocks[key]

    def _patterns(self, layout: Layout, gpus: int, recompute: str) -> list[str]:
        """The layers cut into stages of about the same time, and into stages of as many layers."""
        symbols = layer_symbols(self.workload.cfg.model.hybrid_pattern)
        if layout.pipeline == 1:
            return [symbols]
        even = even_edges(len(symbols), layout.pipeline)
        clock = self._clock(self.configure(layout, gpus, recompute, cut_pattern(symbols, even)))
        seconds = [work.seconds for work in clock.layers]
        seconds[0] += clock.frames.seconds
        return [cut_pattern(symbols, edges) for edges in (balanced(seconds, layout.pipeline), even)]


def balanced(weights: Sequence[float], parts: int) -> list[int]:
    """Edges of consecutive parts, none empty, whose heaviest is as light as can be.

    Args:
        weights: of the items.
        parts: how many.

    Returns:
        parts + 1 indices from 0 to the number of items.
    """
    sums = [0.0, *accumulate(weights)]
    items = len(weights)
    # For every number of items, the heaviest part of their best division, and where its last part starts.
    heaviest, starts = sums[:], []
    for part in range(1, parts):
        row, start = [float("inf")] * (items + 1), [0] * (items + 1)
        for stop in range(part + 1, items + 1):
            row[stop], start[stop] = min(
                (max(heaviest[begin], sums[stop] - sums[begin]), begin) for begin in range(part, stop)
            )
        heaviest = row
        starts.append(start)
    edges = [items]
    for start in reversed(starts):
        edges.append(start[edges[-1]])
    return [0, *reversed(edges)]
