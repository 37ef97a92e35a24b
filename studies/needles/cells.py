"""What the study measures, in the order in which it is worth knowing.

A unit of work is one set of weights under one method: the base model, or the base model after light finetuning under
that method with one seed. Its rows are evaluations at several budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

BUDGETS = (0.25, 0.5, 0.35, 0.15)
#: The budget at which methods are compared first.
HEADLINE = 0.25
SEEDS = (0, 1, 2)
#: The variant of ours that the findings recommend, and the default; the others are its ablations.
OURS = "contrast"
#: How version 0.1 differs: signed Mamba scores, a sigmoid that ends at nearly nothing, no neighbours.
FIRST = ("reduction.score.mamba_contrast=false", "reduction.schedule.floor=null", "reduction.select.frame_share=0.0")
#: The same for schedules that have no floor.
FIRST_STEP = (FIRST[0], FIRST[2])
#: What `hybridprune solve` printed for this model, from 128 clips that are in no table (docs/analysis.md).
SOLVED = (
    "reduction.schedule={name:listed,retention:"
    "[1,0.75,0.25,0.25,0.25,0.15,0.15,0.15,0.15,0.15,0.15,0.15,0.15,0.15,0.15,0]}"
)
#: Baselines of other people's, of which the strongest get all seeds.
NUM_STRONGEST = 2


#: What finetuning draws its budgets from: one checkpoint for every budget.
RANDOM_BUDGETS = ("tuning=random_budget", "tuning.budget.distribution=loguniform")
#: A front passes on a fixed share, so a checkpoint with it is finetuned at the headline budget.
FIXED_BUDGET = ()


@dataclass(frozen=True)
class Method:
    """One way to drop visual tokens.

    Attributes:
        name: in rows and tables.
        label: for people.
        overrides: of the configuration; the budget comes on top.
        ours: a variant of ours, not a baseline.
        headline_only: measured at the headline budget alone.
        tuning: overrides of its light finetuning.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    ours: bool = False
    headline_only: bool = False
    tuning: tuple[str, ...] = RANDOM_BUDGETS

    @property
    def tuned_stage(self) -> str:
        """Of the checkpoint that serves every budget; a front's is finetuned at the headline budget."""
        return "after_fixed" if self.tuning == FIXED_BUDGET else "after"


METHODS = (
    Method(OURS, "ours: all layers, with contrast and neighbours", ("reduction=query",), ours=True),
    Method("contrast_attention", "ours, attention layers only", ("reduction=attention_only",), ours=True),
    Method("contrast_mamba", "ours, Mamba layers only", ("reduction=mamba_only",), ours=True),
    Method("contrast_without_dt", "ours, without dt", ("reduction=query_without_dt",), ours=True),
    Method("contrast_with_decay", "ours, with decay", ("reduction=query_with_decay",), ours=True),
    Method("signed", "ours, without contrast", ("reduction=query_signed",), ours=True),
    Method(
        "contrast_alone", "ours, without neighbours", ("reduction=query", "reduction.select.frame_share=0.0"), ours=True
    ),
    Method("contrast_plateau", "ours, as a plateau", ("reduction=plateau",), ours=True),
    Method(
        "contrast_solved",
        "ours, solved",
        ("reduction=query", "reduction.budget=0.25", SOLVED),
        ours=True,
        headline_only=True,
    ),
    Method("random", "random", ("reduction=random",)),
    # The control for the score alone: ours but for it.
    Method("random_all_layers", "random, on the schedule of ours", ("reduction=query", "reduction.score=random")),
    Method(
        "random_same_schedule",
        "random, on the schedule of 0.1 with attention layers",
        ("reduction=attention_frames", "reduction.score=random"),
    ),
    Method("uniform", "uniform stride", ("reduction=uniform",)),
    Method("fastv", "FastV", ("reduction=fastv",)),
    Method("pyramiddrop", "PyramidDrop", ("reduction=pyramiddrop",)),
    Method("evs", "EVS before the LM", ("reduction=evs",), tuning=FIXED_BUDGET),
    Method("utrc", "UTRC (output norm, merging)", ("reduction=utrc",)),
    Method("tome", "ToMe before the LM", ("reduction=tome",), tuning=FIXED_BUDGET),
    # What version 0.1 recommended.
    Method(
        "attention_frames",
        "0.1: attention layers, floor 0.1, with neighbours",
        ("reduction=attention_frames",),
        ours=True,
    ),
    Method("attention_floor", "0.1: attention layers, floor 0.1", ("reduction=attention_floor",), ours=True),
    # That schedule has nothing left to drop in those Mamba layers, so it says nothing about them.
    Method(
        "attention_mamba_frames",
        "0.1: attention layers and Mamba layers 6 to 13, floor 0.1, with neighbours",
        ("reduction=attention_frames", "reduction.layers=[1,4,6,8,9,11,13]", FIRST[0]),
        ours=True,
    ),
    Method("query", "0.1: all layers", ("reduction=query", *FIRST), ours=True),
    Method(
        "query_floor",
        "0.1: all layers, floor 0.1",
        ("reduction=query", *FIRST_STEP, "reduction.schedule.floor=0.1"),
        ours=True,
    ),
    Method("query_with_decay", "0.1: all layers, with decay", ("reduction=query_with_decay", *FIRST), ours=True),
    Method("attention_only", "0.1: attention layers", ("reduction=attention_only", *FIRST), ours=True),
    Method("mamba_only", "0.1: Mamba layers", ("reduction=mamba_only", *FIRST), ours=True),
    Method("constant", "0.1: constant from layer 1 on", ("reduction=constant", *FIRST_STEP), ours=True),
    Method(
        "one_shot",
        "0.1: one drop after layer 1",
        ("reduction=constant", "reduction.schedule.layer=1", *FIRST_STEP),
        ours=True,
    ),
    # Its layer is an attention layer, so no Mamba layer scores.
    Method(
        "one_shot_frames",
        "one drop after layer 1, with neighbours",
        ("reduction=constant", "reduction.schedule.layer=1"),
        ours=True,
    ),
    Method(
        "evs_query",
        "EVS before the LM and 0.1 (all layers) inside",
        ("reduction=evs_query", *FIRST),
        ours=True,
        tuning=(*RANDOM_BUDGETS, "tuning.budget.high=0.5"),
    ),
    Method(
        "evs_attention",
        "EVS before the LM and 0.1 (attention layers) inside",
        ("reduction=evs_attention",),
        ours=True,
        tuning=(*RANDOM_BUDGETS, "tuning.budget.high=0.5"),
    ),
    Method("longmamba", "LongMamba's step filter (drops nothing)", ("reduction=longmamba",), headline_only=True),
)
#: Beside ours, what is also finetuned at the headline budget alone: what drops inside and is compared with it, and the
#: model with every token.
FIXED = (
    "none",
    "contrast_attention",
    "contrast_plateau",
    "contrast_solved",
    "random_all_layers",
    "pyramiddrop",
    "attention_frames",
    "attention_floor",
    "random",
    "random_same_schedule",
    "uniform",
    "fastv",
    "evs",
    "utrc",
    "one_shot",
    "one_shot_frames",
    "attention_mamba_frames",
    "query",
    "tome",
    "evs_attention",
)
#: Variants of ours that get all seeds as well: what each takes away from it is one of the claims.
ABLATIONS = (
    "contrast_attention",
    "contrast_plateau",
    "contrast_solved",
    "random_all_layers",
    "one_shot_frames",
    "attention_frames",
    "attention_floor",
    "one_shot",
)
METHOD_BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Unit:
    """Weights and what to evaluate them under.

    Attributes:
        stage: before (the base model), after (finetuned as the method says, at random budgets), or after_fixed (at the
            headline budget).
        method: a name of ``METHODS``, or "none" for the base model with every token.
        seed: of the finetuning; 0 for the base model.
        budgets: to evaluate at.
    """

    stage: str
    method: str
    seed: int
    budgets: tuple[float, ...]

    @property
    def weights(self) -> str:
        """Name of the finetuning run; empty for the base model."""
        return "" if self.stage == "before" else f"{self.stage}-{self.method}-{self.seed}"

    def key(self, budget: float) -> str:
        """Name of one row."""
        return f"{self.stage}/{self.method}/{budget:g}/{self.seed}"

    def missing(self, rows: dict[str, Any]) -> tuple[float, ...]:
        """Budgets without a row."""
        return tuple(budget for budget in self.budgets if self.key(budget) not in rows)


def units(rows: dict[str, Any]) -> Iterator[Unit]:
    """All units, the most telling first; which baselines are the strongest is read from the rows so far.

    Args:
        rows: finished rows by key; may grow while this is being read.
    """
    yield Unit("before", "none", 0, (1.0,))
    for method in METHODS:
        yield Unit("before", method.name, 0, (HEADLINE,))
    yield Unit("after_fixed", OURS, 0, (HEADLINE, 1.0))
    for name in FIXED:
        yield fixed_unit(name, 0)
    yield Unit("after", OURS, 0, (1.0, *BUDGETS))
    for seed in SEEDS[1:]:
        for name in (OURS, "none", *strongest_baselines(rows), *ABLATIONS):
            yield fixed_unit(name, seed)
    for method in METHODS:
        if not method.headline_only:
            yield Unit("before", method.name, 0, BUDGETS)
    for budgets in ((HEADLINE,), BUDGETS):
        for method in METHODS:
            if method.name != OURS and not (method.headline_only and budgets == BUDGETS):
                yield Unit(method.tuned_stage, method.name, 0, budgets)
    for seed in SEEDS[1:]:
        yield Unit("after", OURS, seed, (HEADLINE,))


def fixed_unit(method: str, seed: int) -> Unit:
    """Finetuned at the budget it is tested at: the headline, or with every token for "none"."""
    return Unit("after_fixed", method, seed, (1.0 if method == "none" else HEADLINE,))


def strongest_baselines(rows: dict[str, Any]) -> list[str]:
    """The baselines that answer best at the headline budget, finetuned where measured, else as the base model."""

    def accuracy(method: str) -> float:
        for stage in ("after_fixed", "before"):
            found = [row["accuracy"] for row in rows_of(rows.values(), stage, method, HEADLINE)]
            if found:
                return fmean(found)
        return -1.0

    baselines = [method.name for method in METHODS if not method.ours and not method.headline_only]
    return sorted(baselines, key=accuracy, reverse=True)[:NUM_STRONGEST]


def rows_of(rows: Sequence[dict[str, Any]] | Any, stage: str, method: str, budget: float) -> list[dict[str, Any]]:
    """The rows of one table cell, one per seed, in the order of their seeds."""
    found = [row for row in rows if row["stage"] == stage and row["method"] == method and row["budget"] == budget]
    return sorted(found, key=lambda row: row["seed"])
