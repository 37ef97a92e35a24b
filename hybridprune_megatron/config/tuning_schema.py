"""The typed configuration of the ``tuning`` group: how finetuning goes about weights, budgets and targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from hybridprune_megatron.bounds import OneOf, PositiveShare, Range, Share, ShareBelowOne, check_bounds
from hybridprune_megatron.checks import fail
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.budgets import DISTRIBUTIONS

PROJECTOR_TARGET = "projector"


def language_targets() -> tuple[str, ...]:
    """Linears of the language model that may have adapters, by kind of layer."""
    return tuple(name for kind in KINDS.values() for name in kind.targets)


@dataclass
class BudgetConfig:
    """Which budget a sample is trained at. Evaluation and export always use ``reduction.budget``.

    Attributes:
        distribution: fixed (reduction.budget), or drawn: uniform, loguniform (from low to high), choice (of choices).
        low: smallest budget that uniform and loguniform draw.
        high: largest budget that uniform and loguniform draw; 1 = nothing dropped.
        choices: budgets that choice draws from, equally likely.
        per: what gets a draw of its own; sample, or step (all samples of a step share it).
    """

    distribution: Annotated[str, OneOf(*DISTRIBUTIONS)] = "fixed"
    low: PositiveShare = 0.15
    high: PositiveShare = 1.0
    choices: list[PositiveShare] = field(default_factory=list)
    per: Annotated[str, OneOf("sample", "step")] = "sample"

    def __post_init__(self) -> None:
        prefix = "tuning.budget"
        check_bounds(prefix, self)
        if self.low > self.high:
            allowed = f"must be above 0 and at most {prefix}.high={self.high}"
            raise fail(f"{prefix}.low", self.low, allowed, f"set e.g. {prefix}.low=0.15")
        if self.distribution == "choice" and not self.choices:
            allowed = "must name at least one budget, each above 0 and at most 1"
            raise fail(f"{prefix}.choices", self.choices, allowed, f"set e.g. '{prefix}.choices=[0.25,0.5,1.0]'")

    def largest(self, fixed: float) -> float:
        """The largest budget that a sample is trained at.

        Args:
            fixed: that of a run that draws none.
        """
        if self.distribution == "fixed":
            return fixed
        return max(self.choices) if self.distribution == "choice" else self.high


@dataclass
class DistillationConfig:
    """A second target: the answer's distribution from the same model with nothing dropped.

    Attributes:
        weight: w in the loss (1 - w) * cross entropy + w * temperature^2 * KL(teacher, student); 0 = off.
        temperature: divides the logits of both in the KL, from 0.01 to 100.
        teacher: whose weights; initial (those the run starts from, trained ones are kept twice) or self (of this step).
    """

    weight: Share = 0.0
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    teacher: Annotated[str, OneOf("initial", "self")] = "initial"

    def __post_init__(self) -> None:
        check_bounds("tuning.distillation", self)


@dataclass
class LoraConfig:
    """Low-rank adapters: what they stand on is frozen, they learn, and an export has them merged into the weights.

    Attributes:
        rank: rank of every adapter; 0 = no adapters.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of an adapter's input that is dropped in training, from 0 to below 1.
        targets: linears with an adapter; linear_qkv, linear_proj, linear_fc1, linear_fc2, in_proj, out_proj, projector.
    """

    rank: Annotated[int, Range(0, 2**20)] = 0
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 32.0
    dropout: ShareBelowOne = 0.0
    targets: list[str] = field(default_factory=lambda: list(language_targets()))

    def __post_init__(self) -> None:
        prefix = "tuning.lora"
        check_bounds(prefix, self)
        allowed = (*language_targets(), PROJECTOR_TARGET)
        if not self.targets or not set(self.targets) <= set(allowed):
            words = f"allowed is a list of {', '.join(allowed)}"
            raise fail(f"{prefix}.targets", self.targets, words, f"set e.g. '{prefix}.targets=[in_proj,out_proj]'")


@dataclass
class TuningConfig:
    """How finetuning goes about budgets, targets and weights.

    Attributes:
        budget: which budget a sample is trained at.
        distillation: a second target beside the labels.
        lora: adapters that learn instead of the language model's weights.
    """

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
