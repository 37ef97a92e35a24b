"""An empty picture, and how layers are called in one; what is drawn on it is its caller's."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
