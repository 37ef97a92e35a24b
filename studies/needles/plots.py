"""The study in one picture: accuracy over budget, before and after light finetuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.needles.cells import BUDGETS, METHODS, OURS, Method, rows_of
from studies.needles.intervals import accuracy

#: Colour-blind safe (Okabe and Ito, without the yellow that white swallows); ours is thick and black.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_MARKERS = "osv^Dx"
_OURS_COLOUR = "#000000"
_STAGES = {"before": "base model", "after": "after light finetuning"}


def plot_study(path: Path, rows: Sequence[dict[str, Any]], chance: float) -> None:
    """Writes one PNG: ours beside what others do above, beside its own variants below; a column a stage.

    Args:
        path: the file.
        rows: of the study.
        chance: accuracy of a guess.
    """
    figure = Figure(figsize=(12, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    several = [method for method in METHODS if not method.headline_only]
    groups = {
        "ours and baselines": [method for method in several if method.name == OURS or not method.ours],
        "ours and its variants": [method for method in several if method.ours],
    }
    for line, (name, methods) in zip(panels, groups.items()):
        for panel, stage in zip(line, _STAGES):
            _plot_panel(panel, rows, stage, methods, chance)
        line[0].set_ylabel(f"{name}:\naccuracy on held-out questions")
        line[1].legend(*line[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    for panel, title in zip(panels[0], _STAGES.values()):
        panel.set_title(title)
    for panel in panels[-1]:
        panel.set_xlabel("budget: mean share of visual tokens over layers")
        panel.set_xticks(sorted(BUDGETS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_panel(
    panel: Axes, rows: Sequence[dict[str, Any]], stage: str, methods: Sequence[Method], chance: float
) -> None:
    full = rows_of(rows, "before", "none", 1.0)
    if full:
        panel.axhline(
            accuracy(full).mean, color="#666666", linestyle="--", linewidth=1, label="every token, base model"
        )
    panel.axhline(chance, color="#BBBBBB", linestyle=":", label="chance")
    for number, method in enumerate(methods):
        _plot_method(panel, rows, stage, method, number)
    panel.set_ylim(max(0.0, chance - 0.1), 1)
    panel.grid(alpha=0.3)


def _plot_method(panel: Axes, rows: Sequence[dict[str, Any]], stage: str, method: Method, number: int) -> None:
    stage = "before" if stage == "before" else method.tuned_stage
    found = [(budget, rows_of(rows, stage, method.name, budget)) for budget in sorted(BUDGETS)]
    points = [(budget, accuracy(cell)) for budget, cell in found if cell]
    main = method.name == OURS
    panel.errorbar(
        [budget for budget, _ in points],
        [estimate.mean for _, estimate in points],
        # Intervals of the main line only: fifteen of them would hide one another.
        yerr=[[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]] if main else None,
        color=_OURS_COLOUR if main else _COLOURS[number % len(_COLOURS)],
        linewidth=2.5 if main else 1.2,
        marker="o" if main else _MARKERS[number % len(_MARKERS)],
        markersize=5,
        label=method.label,
        zorder=3 if main else 2,
    )
