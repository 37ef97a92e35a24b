"""The study in one picture: what every method answers at the headline budget, and what a few do at others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from hybridprune_megatron.evaluation.figure import new_figure
from studies.needles.cells import BUDGETS, HEADLINE, METHOD_BY_NAME, METHODS, OURS, Method, rows_of
from studies.needles.intervals import accuracy

#: Before and after light finetuning, the left panel's two colours.
_BEFORE, _AFTER, _GREY = "#999999", "#0072B2", "#666666"
#: Methods over the budget, each a colour of its own: colour-blind safe (Okabe and Ito).
_LINES = {
    "attention_frames": "#000000",
    "pyramiddrop": "#D55E00",
    "evs": "#E69F00",
    "fastv": "#CC79A7",
    "random_same_schedule": "#009E73",
    "uniform": "#56B4E9",
}
#: What version 0.1 did is in the page's tables.
_EARLIER = "0.1"

Rows = Sequence[dict[str, Any]]


def plot_study(path: Path, rows: Rows, chance: float) -> None:
    """Writes one PNG: methods at the headline budget before and after finetuning, and some of them over budgets.

    Args:
        path: the file.
        rows: of the study.
        chance: accuracy of a guess.
    """
    figure = new_figure(13, 6.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    _plot_headline(left, rows, chance)
    _plot_budgets(right, rows, chance)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_headline(axes: Axes, rows: Rows, chance: float) -> None:
    # The last of them drops nothing.
    methods = [method for method in METHODS if _EARLIER not in method.label and method.name != "longmamba"]
    shown = [(method, _stage(rows, method)) for method in methods]
    measured = [(method, stage) for method, stage in shown if rows_of(rows, "before", method.name, HEADLINE)]
    # What has not been finetuned comes last, by what it answers before.
    measured.sort(key=lambda each: (each[1] != "before", _mean(rows, each[1], each[0])))
    for height, (method, stage) in enumerate(measured):
        for each, colour, size in (("before", _BEFORE, 5), (stage, _AFTER, 7)):
            found = rows_of(rows, each, method.name, HEADLINE)
            if found and (each != "before" or colour == _BEFORE):
                share = accuracy(found)
                axes.plot([share.low, share.high], [height, height], color=colour, linewidth=1.2, zorder=2)
                axes.plot(share.mean, height, "o", color=colour, markersize=size, zorder=3)
    axes.set_ylim(-0.7, len(measured) - 0.4)
    axes.set_yticks(range(len(measured)), [method.label for method, _ in measured], fontsize=9)
    for label, (method, _) in zip(axes.get_yticklabels(), measured):
        label.set_fontweight("bold" if method.name == OURS else "normal")
    full = rows_of(rows, "after_fixed", "none", 1.0) or rows_of(rows, "before", "none", 1.0)
    if full:
        axes.axvline(accuracy(full).mean, color=_GREY, linestyle="--", linewidth=1)
        axes.text(accuracy(full).mean, len(measured) - 0.3, "every token", ha="center", fontsize=9, color=_GREY)
    axes.axvline(chance, color=_GREY, linestyle=":", linewidth=1)
    axes.text(chance, len(measured) - 0.3, "chance", ha="center", fontsize=9, color=_GREY)
    for name, colour in (("before finetuning", _BEFORE), ("after", _AFTER)):
        axes.plot([], [], "o-", color=colour, label=name)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.set_title(f"At {HEADLINE:g} of the visual tokens (bars: 95 % intervals)", pad=18)
    axes.set_xlabel("accuracy on held-out questions")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_budgets(axes: Axes, rows: Rows, chance: float) -> None:
    for name, colour in _LINES.items():
        method = METHOD_BY_NAME[name]
        found = [(budget, rows_of(rows, method.tuned_stage, name, budget)) for budget in sorted(BUDGETS)]
        points = [(budget, accuracy(cell).mean) for budget, cell in found if cell]
        if points:
            axes.plot(*zip(*points), "o-", color=colour, label=method.label, linewidth=1.5, markersize=5)
    axes.axhline(chance, color=_GREY, linestyle=":", linewidth=1)
    axes.set_xticks(sorted(BUDGETS))
    axes.set_xlabel("budget: mean share of visual tokens over layers")
    axes.set_title("Over budgets, after finetuning", pad=18)
    axes.set_ylim(chance - 0.2, 0.85)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _stage(rows: Rows, method: Method) -> str:
    """The finetuning of a method that is shown: at this budget, else at random ones, else none."""
    stages = ("after_fixed", "after")
    return next((stage for stage in stages if rows_of(rows, stage, method.name, HEADLINE)), "before")


def _mean(rows: Rows, stage: str, method: Method) -> float:
    return accuracy(rows_of(rows, stage, method.name, HEADLINE)).mean
