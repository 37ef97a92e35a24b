"""The picture of one run or several, from their logs: losses, validation, tokens per second. Colour-blind safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hybridprune_megatron.evaluation.figure import new_figure

#: Okabe and Ito, without yellow; with a line style each, more runs than colours can be told apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":", "-.")
#: Steps that a smoothed loss is the mean of, as a share of all.
_SMOOTH = 0.05

Logs = Mapping[str, tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]


def plot_runs(path: Path, logs: Logs, creator: str) -> None:
    """Writes a PNG.

    Args:
        path: of the file.
        logs: steps and validations by the name of the run; each has at least one step.
        creator: goes into the file, which tells later who wrote it.
    """
    losses, shares = validated(logs)
    panels = [("training loss (nats per answer token)", _draw_loss), ("tokens per second", _draw_speed)]
    if any("distillation_loss" in row for steps, _ in logs.values() for row in steps):
        panels.append(("parts of the training loss (nats per answer token)", _draw_parts))
    panels += [("validation loss (nats per answer token)", _drawing(losses))] if losses else []
    panels += [("validation, share of exact answers", _drawing(shares))] if shares else []
    rows = 1 if len(panels) < 4 else 2
    columns = -(-len(panels) // rows)
    figure = new_figure(5.6 * columns, 3.8 * rows + 0.22 * len(logs))
    for axes, (title, draw) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        for number, log in enumerate(logs.values()):
            draw(axes, log, _look(number))
    # The first steps of a run may be many times above all others.
    figure.axes[0].set_ylim(0, 1.05 * max(_settled(rows) for rows, _ in logs.values()))
    figure.axes[1].set_ylim(bottom=0)
    if len(logs) > 1:
        handles = [Line2D([], [], **_look(number)) for number in range(len(logs))]
        figure.legend(handles, list(logs), loc="outside lower left", frameon=False, fontsize=8)
    else:
        figure.suptitle(next(iter(logs)), fontsize=10)
    figure.savefig(path, format="png", metadata={"Creator": creator})


def validated(logs: Logs) -> tuple[list[str], list[str]]:
    """Names of the losses and of the shares that validations of any run hold; see ``engine.validation.Validator``."""
    names = dict.fromkeys(name for _, validations in logs.values() for row in validations for name in row)
    found = [[name for name in names if name in (kind, f"{kind}_full")] for kind in ("loss", "accuracy")]
    return found[0], found[1]


def smoothed(values: Sequence[float], width: int) -> np.ndarray:
    """Mean of each value and those before it, ``width`` at most; what is not a number is left out."""
    found = np.asarray(values, dtype=float)
    known = np.isfinite(found)
    sums = np.cumsum(np.where(known, found, 0.0))
    counts = np.cumsum(known)
    start = np.maximum(np.arange(len(found)) - width, -1)
    before, past = np.where(start >= 0, sums[start], 0.0), np.where(start >= 0, counts[start], 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums - before) / (counts - past)


def _look(number: int) -> dict[str, Any]:
    """Colour and style of a run's lines."""
    style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": style}


def _width(rows: Sequence[Any]) -> int:
    return max(round(_SMOOTH * len(rows)), 1)


def _settled(rows: Sequence[Mapping[str, Any]]) -> float:
    """The highest smoothed loss after the first tenth of the steps; 1 where there is none."""
    losses = smoothed([row["loss"] for row in rows], _width(rows))[len(rows) // 10 :]
    return float(np.nanmax(losses)) if np.isfinite(losses).any() else 1.0


def _draw_loss(axes: Axes, log: tuple[Sequence[Mapping[str, Any]], Any], look: dict[str, Any]) -> None:
    steps, losses = [row["step"] for row in log[0]], [row["loss"] for row in log[0]]
    axes.plot(steps, losses, color=look["color"], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses, _width(steps)), **look)


def _draw_speed(axes: Axes, log: tuple[Sequence[Mapping[str, Any]], Any], look: dict[str, Any]) -> None:
    speeds = [row["tokens"] / row["seconds"] if row["seconds"] else float("nan") for row in log[0]]
    axes.plot([row["step"] for row in log[0]], smoothed(speeds, _width(speeds)), **look)


def _draw_parts(axes: Axes, log: tuple[Sequence[Mapping[str, Any]], Any], look: dict[str, Any]) -> None:
    """Answers' and distillation's loss of a run that distils."""
    for name, width in (("answer_loss", 1.6), ("distillation_loss", 0.8)):
        found = [(row["step"], row[name]) for row in log[0] if name in row]
        if found:
            steps, losses = zip(*found)
            line = smoothed(losses, _width(steps))
            axes.plot(steps, line, linewidth=width, **look)
            label, end = name.removesuffix("_loss"), (steps[-1], line[-1])
            axes.annotate(label, end, xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=7)


def _drawing(names: Sequence[str]) -> Any:
    """Draws some figures of validations: under the model's reduction filled, with every token (``_full``) open."""

    def draw(axes: Axes, log: tuple[Any, Sequence[Mapping[str, Any]]], look: dict[str, Any]) -> None:
        for name in names:
            found = [(row["step"], row[name]) for row in log[1] if isinstance(row.get(name), int | float)]
            if not found:
                continue
            fill = "white" if name.endswith("_full") else look["color"]
            axes.plot(*zip(*found), marker="o", markerfacecolor=fill, markersize=4, **look)
            label = "every token" if name.endswith("_full") else "reduced" if f"{name}_full" in names else ""
            axes.annotate(label, found[-1], xytext=(4, 4), textcoords="offset points", fontsize=7)
        if not any("loss" in name for name in names):
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))

    return draw
