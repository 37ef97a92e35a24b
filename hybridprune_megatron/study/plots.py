"""The study in one picture: accuracy over budget, before and after light finetuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridprune_megatron.study.cells import BUDGETS, METHODS, OURS, Method, rows_of
from hybridprune_megatron.study.intervals import accuracy

#: Colour-blind safe (Okabe and Ito); ours is thick and dark, its variants dashed.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_OURS_COLOUR = "#000000"


def plot_study(path: Path, rows: Sequence[dict[str, Any]], chance: float) -> None:
    """Writes one PNG with a panel a stage.

    Args:
        path: the file.
        rows: of the study.
        chance: accuracy of a guess.
    """
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    full = rows_of(rows, "before", "none", 1.0)
    for panel, stage, title in zip(panels, ("before", "after"), ("base model", "after light finetuning")):
        if full:
            panel.axhline(accuracy(full).mean, color="#666666", linestyle=":", label="every token, base model")
        panel.axhline(chance, color="#BBBBBB", linestyle=":", label="chance")
        for number, method in enumerate(method for method in METHODS if not method.headline_only):
            _plot_method(panel, rows, stage, method, _COLOURS[number % len(_COLOURS)])
        panel.set_title(title)
        panel.set_xlabel("budget: mean share of visual tokens over layers")
        panel.set_xticks(sorted(BUDGETS))
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on held-out questions")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_method(panel: Axes, rows: Sequence[dict[str, Any]], stage: str, method: Method, colour: str) -> None:
    stage = "before" if stage == "before" else method.tuned_stage
    found = [(budget, rows_of(rows, stage, method.name, budget)) for budget in sorted(BUDGETS)]
    points = [(budget, accuracy(cell)) for budget, cell in found if cell]
    if not points:
        return
    main = method.name == OURS
    panel.errorbar(
        [budget for budget, _ in points],
        [estimate.mean for _, estimate in points],
        # Intervals of the main line only: fifteen of them would hide one another.
        yerr=[[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]] if main else None,
        color=_OURS_COLOUR if main else colour,
        linewidth=2.5 if main else 1.2,
        linestyle="-" if main or not method.ours else "--",
        marker="o",
        markersize=5 if main else 3,
        label=method.label,
        zorder=3 if main else 2,
    )
