"""The picture of a run: loss over steps, and retention over depth by layer type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.schedule import layer_symbols

_LOSS_COLOUR = "#333333"
_SMOOTH_STEPS = 10


def plot_run(
    path: Path,
    rows: Sequence[dict[str, Any]],
    pattern: str,
    target: Sequence[float],
    measured: Sequence[float],
    budget: float,
) -> None:
    """Writes one PNG.

    Args:
        path: the file.
        rows: of the step log, each with "step" and "loss".
        pattern: hybrid layer pattern.
        target: retention that the schedule asks of every layer.
        measured: retention that was measured.
        budget: mean retention that was asked for.
    """
    # Not pyplot: it keeps figures in a global list and picks a backend for the whole process.
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_loss(left, rows)
    _plot_retention(right, layer_symbols(pattern), target, measured, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of every value and up to ``width`` - 1 values before it."""
    means = []
    for stop in range(1, len(values) + 1):
        window = values[max(0, stop - width) : stop]
        means.append(sum(window) / len(window))
    return means


def _plot_loss(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color=_LOSS_COLOUR, alpha=0.35, linewidth=1, label="every step")
    smooth = running_mean(losses, _SMOOTH_STEPS)
    axes.plot(steps, smooth, color=_LOSS_COLOUR, linewidth=2, label=f"mean of {_SMOOTH_STEPS} steps")
    axes.set(
        title="Loss while finetuning under reduction", xlabel="step", ylabel="loss per answer token", ylim=(0, None)
    )
    axes.legend(frameon=False)
    _tidy(axes)


def _plot_retention(
    axes: Axes, symbols: str, target: Sequence[float], measured: Sequence[float], budget: float
) -> None:
    layers = range(len(symbols))
    for symbol in dict.fromkeys(symbols):
        mine = [layer for layer in layers if symbols[layer] == symbol]
        kind = KINDS[symbol]
        name, colour = kind.label if kind.scores else f"{kind.label} (cannot score)", kind.colour
        axes.bar(mine, [measured[layer] for layer in mine], color=colour, label=f"measured, {name}")
    axes.plot(layers, target, color="black", marker="_", markersize=14, linestyle="none", label="schedule")
    axes.axhline(budget, color="black", linestyle=":", linewidth=1)
    mean = sum(measured) / len(measured)
    axes.annotate(
        f"budget {budget:g}, measured mean {mean:.4f}",
        (len(symbols) - 0.5, budget), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=9,
    )  # fmt: skip
    axes.set(
        title="Visual tokens that enter each layer", xlabel="layer", ylabel="share of the sample's", ylim=(0, 1.05)
    )
    if len(symbols) <= 32:
        axes.set_xticks(list(layers), [f"{symbol}\n{layer}" for layer, symbol in enumerate(symbols)])
    axes.legend(frameon=False)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
