"""The typed configuration of the ``tuning`` group: how finetuning goes about weights, budgets and targets."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridprune_megatron.checks import above_zero, at_least, fail, one_of, within
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.budgets import DISTRIBUTIONS

#: Linears of the language model, by kind of layer.
LANGUAGE_TARGETS = tuple(name for kind in KINDS.values() for name in kind.targets)
PROJECTOR_TARGET = "projector"


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

    distribution: str = "fixed"
    low: float = 0.15
    high: float = 1.0
    choices: list[float] = field(default_factory=list)
    per: str = "sample"

    def __post_init__(self) -> None:
        prefix = "tuning.budget"
        one_of(prefix, self, "distribution", DISTRIBUTIONS)
        one_of(prefix, self, "per", ("sample", "step"))
        if not 0 < self.high <= 1:
            raise fail(f"{prefix}.high", self.high, "must be above 0 and at most 1", f"set e.g. {prefix}.high=1")
        if not 0 < self.low <= self.high:
            allowed = f"must be above 0 and at most {prefix}.high={self.high}"
            raise fail(f"{prefix}.low", self.low, allowed, f"set e.g. {prefix}.low=0.15")
        drawn = self.choices if self.distribution == "choice" else [1.0]
        if not drawn or not all(0 < budget <= 1 for budget in drawn):
            allowed = "must name at least one budget, each above 0 and at most 1"
            raise fail(f"{prefix}.choices", self.choices, allowed, f"set e.g. '{prefix}.choices=[0.25,0.5,1.0]'")


@dataclass
class DistillationConfig:
    """A second target: the answer's distribution from the same model with nothing dropped.

    Attributes:
        weight: w in the loss (1 - w) * cross entropy + w * temperature^2 * KL(teacher, student); 0 = off.
        temperature: divides the logits of both in the KL, above 0.
        teacher: whose weights; initial (those the run starts from, trained ones are kept twice) or self (of this step).
    """

    weight: float = 0.0
    temperature: float = 1.0
    teacher: str = "initial"

    def __post_init__(self) -> None:
        prefix = "tuning.distillation"
        within(prefix, self, 0, 1, "weight")
        above_zero(prefix, self, "temperature")
        one_of(prefix, self, "teacher", ("initial", "self"))


@dataclass
class LoraConfig:
    """Low-rank adapters: what they stand on is frozen, they learn, and an export has them merged into the weights.

    Attributes:
        rank: rank of every adapter; 0 = no adapters.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of an adapter's input that is dropped in training, from 0 to below 1.
        targets: linears with an adapter; linear_qkv, linear_proj, linear_fc1, linear_fc2, in_proj, out_proj, projector.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LANGUAGE_TARGETS))

    def __post_init__(self) -> None:
        prefix = "tuning.lora"
        at_least(prefix, self, 0, "rank")
        above_zero(prefix, self, "alpha")
        if not 0 <= self.dropout < 1:
            fix = f"set e.g. {prefix}.dropout=0.05"
            raise fail(f"{prefix}.dropout", self.dropout, "must be from 0 to below 1", fix)
        allowed = (*LANGUAGE_TARGETS, PROJECTOR_TARGET)
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
