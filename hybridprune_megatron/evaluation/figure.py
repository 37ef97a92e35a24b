"""An empty picture, a line with intervals, and how layers are called in one; the rest is its caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridprune_megatron.evaluation.intervals import Interval

#: Of frames that the answer needs. Okabe and Ito's orange; kinds of layers have their blue, red, green and grey.
NEEDED_COLOUR = "#E69F00"


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """An empty figure of a size in inches."""
    # Not pyplot: it keeps figures in a global list and picks a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def layer_name(layer: int, symbols: str, between: str = " ") -> str:
    """Number and symbol, "3 *"."""
    return f"{layer}{between}{symbols[layer]}"


def interval_line(
    axes: Axes, at: Sequence[float], values: Sequence[Interval], colour: str, marker: str, label: str
) -> None:
    """A line of means with their intervals; squares are open and dashed, and show circles below them."""
    means = [each.mean for each in values]
    below = [max(0.0, each.mean - each.low) for each in values]
    above = [max(0.0, each.high - each.mean) for each in values]
    style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "none", "markersize": 9} if marker == "s" else {}
    axes.errorbar(at, means, yerr=[below, above], color=colour, marker=marker, capsize=3, label=label, **style)
