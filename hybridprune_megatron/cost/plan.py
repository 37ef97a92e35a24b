"""From a configuration and a target to a budget, with everything that is printed about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.cost.memory import GIB, Memory, Packed, prefill_memory, training_memory
from hybridprune_megatron.cost.prefill import Prefill, Prompt, prefill_cost
from hybridprune_megatron.method.schedule import Listed

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.cost.target import TargetConfig


@dataclass(frozen=True)
class Plan:
    """A budget and what it costs.

    Attributes:
        budget: mean retention.
        prefill: operations and bytes of one prefill.
        memory: peak of the fullest rank without and with reduction, by what it is the memory of.
    """

    budget: float
    prefill: Prefill
    memory: dict[str, tuple[Memory, Memory]]


def prompt_of(cfg: Config, target: TargetConfig) -> Prompt:
    """The sample that is planned for.

    Frames come from the target, else from the most that ``data.*`` gives a video. A model without a tower is taken as
    the language model of one that has one: its sample fills ``data.sequence_length``.

    Raises:
        ConfigError: frames for a model without a tower, or no room for visual tokens.
    """
    vision = cfg.model.vision
    if target.visual_tokens is not None:
        return Prompt(target.visual_tokens, target.text_tokens, target.question_tokens)
    if vision is None:
        if target.frames is not None:
            reason = f"model {cfg.model.name} has no vision tower, so a frame has no size"
            raise fail("target.frames", target.frames, reason, "set target.visual_tokens instead")
        if cfg.data.sequence_length <= target.text_tokens:
            reason = f"data.sequence_length={cfg.data.sequence_length} leaves no room for visual tokens"
            raise fail("target.text_tokens", target.text_tokens, reason, "lower it or set target.visual_tokens")
        return Prompt(cfg.data.sequence_length - target.text_tokens, target.text_tokens, target.question_tokens)
    frames = target.frames or cfg.data.most_frames
    text = target.text_tokens + frames * target.frame_text_tokens
    return Prompt(frames * vision.tokens_per_frame, text, target.question_tokens, frames)


def make_plan(cfg: Config, target: TargetConfig) -> Plan:
    """The largest budget that reaches the target, or the configured one without a target.

    Raises:
        ConfigError: a target that no budget of the configured shape reaches, with the best that one does.
    """
    counted = _Counter(cfg, target)
    if target.speedup is None and target.memory_gib is None:
        return counted.plan(cfg.reduction.budget)
    if isinstance(cfg.reduction.schedule, Listed):
        raise ConfigError(
            "reduction.schedule=listed: a list of shares has no budget to solve for; take another reduction.schedule"
        )
    found = []
    if target.speedup is not None:
        wanted = target.speedup
        found.append(counted.largest(lambda budget: counted.speedup(budget) >= wanted, counted.too_slow))
    if target.memory_gib is not None:
        limit = target.memory_gib * GIB
        found.append(counted.largest(lambda budget: counted.peak(budget).total <= limit, counted.too_large))
    return counted.plan(min(found))


class _Counter:
    """The cost model at any budget of one configuration."""

    def __init__(self, cfg: Config, target: TargetConfig) -> None:
        self.cfg, self.target, self.prompt = cfg, target, prompt_of(cfg, target)

    def prefill(self, budget: float) -> Prefill:
        cfg = self.cfg
        retention = cfg.retention_by_layer if budget == cfg.reduction.budget else cfg.retention_at(budget)
        return prefill_cost(cfg.model, cfg.reduction, retention, self.prompt, cfg.trainer.precision)

    def speedup(self, budget: float) -> float:
        prefill = self.prefill(budget)
        return prefill.speedup_with_vision if self.target.parts == "all" else prefill.speedup

    def peak(self, budget: float) -> Memory:
        """Of what ``target.memory_of`` names."""
        visual = tuple(row.visual for row in self.prefill(budget).rows)
        return self._memory(self.target.memory_of, visual)

    def plan(self, budget: float) -> Plan:
        prefill = self.prefill(budget)
        reduced = tuple(row.visual for row in prefill.rows)
        full = (self.prompt.visual,) * len(reduced)
        kinds = ("training", "prefill") if self.fits else ("prefill",)
        memory = {kind: (self._memory(kind, full), self._memory(kind, reduced)) for kind in kinds}
        return Plan(budget, prefill, memory)

    @property
    def fits(self) -> bool:
        """Whether training could take the sample."""
        return self.counted <= self.cfg.data.sequence_length

    @property
    def counted(self) -> int:
        """What the sample counts for in ``data.sequence_length``."""
        return self.cfg.counted(self.prompt.text, self.prompt.visual)

    def _memory(self, kind: str, visual: tuple[int, ...]) -> Memory:
        prompt = self.prompt
        if kind == "prefill":
            return prefill_memory(self.cfg, Packed(1, visual, prompt.text, prompt.frames, 1))
        if not self.fits:
            raise ConfigError(
                f"target.memory_gib: a sample of {self.counted} tokens does not fit "
                f"data.sequence_length={self.cfg.data.sequence_length}; raise data.sequence_length, plan for a shorter "
                "video, or set target.memory_of=prefill"
            )
        samples = self.cfg.data.sequence_length // self.counted
        return training_memory(self.cfg, Packed(samples, visual, prompt.text, prompt.frames, self.target.answer_tokens))

    def largest(self, reached: Callable[[float], bool], error: Callable[[float], ConfigError]) -> float:
        """The largest budget that reaches something, or the error of the smallest there is."""
        retention_at, highest = lru_cache(None)(self.cfg.retention_at), self.cfg.reduction.front.retention
        budget = largest_budget(retention_at, reached, highest)
        if budget is None:
            raise error(smallest_budget(retention_at, highest))
        return budget

    def too_slow(self, lowest: float) -> ConfigError:
        """Of a speedup that no budget reaches."""
        parts = "tower and projector" if self.target.parts == "all" else "text"
        return fail(
            "target.speedup",
            f"{self.target.speedup:g}",
            f"the best that this schedule reaches is {self.speedup(lowest):.3f}, at reduction.budget={lowest:g} "
            f"({parts} and the layers before the first drop stay)",
            "lower target.speedup, or let earlier layers drop (reduction.layers, reduction.schedule)",
        )

    def too_large(self, lowest: float) -> ConfigError:
        """Of a memory that no budget fits."""
        peak = self.peak(lowest)
        recompute = "" if self.cfg.trainer.recompute == "full" else ", or set trainer.recompute=full"
        return fail(
            "target.memory_gib",
            f"{self.target.memory_gib:g}",
            f"the least that this schedule needs is {peak.total / GIB:.2f} GiB, at reduction.budget={lowest:g} "
            f"({peak.static.total / GIB:.2f} of it weights, gradients and optimizer; worst moment: {peak.moment})",
            f"raise target.memory_gib, shorten data.sequence_length or split more (parallel.*){recompute}",
        )


# Budgets are multiples of one over this.
GRID = 10_000
Retention = tuple[float, ...]


def largest_budget(
    retention_at: Callable[[float], Retention], reached: Callable[[float], bool], highest: float = 1.0
) -> float | None:
    """The largest budget that has a schedule and reaches a target; None if none does.

    Args:
        retention_at: retention per layer at a budget; raises ``ValueError`` below the smallest that has a schedule.
        reached: whether a budget reaches the target; true for all budgets below one that does.
        highest: the largest budget there is (1, or what a reduction before the model passes on).
    """
    top = round(highest * GRID)

    def missed(step: int) -> bool:
        return _exists(retention_at, step) and not reached(step / GRID)

    step = _first_step(missed, 1, top + 1) - 1
    return step / GRID if step and _exists(retention_at, step) else None


def smallest_budget(retention_at: Callable[[float], Retention], highest: float = 1.0) -> float:
    """The smallest budget that has a schedule: everything is dropped at the first chance; arguments as above."""
    return _first_step(lambda step: _exists(retention_at, step), 1, round(highest * GRID)) / GRID


def _exists(retention_at: Callable[[float], Retention], step: int) -> bool:
    try:
        retention_at(step / GRID)
    except ValueError:
        return False
    return True


def _first_step(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest from ``low`` to ``high`` where a condition holds that stays true once it is; it does at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
