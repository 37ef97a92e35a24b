"""The picture of a plan: retention and operations, layer by layer."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridprune_megatron.cost.prefill import Prefill
from hybridprune_megatron.cost.report import flop_unit
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import sum_costs

_FULL = "#dddddd"


def plot_plan(path: Path, prefill: Prefill, name: str) -> None:
    """Writes one PNG."""
    # Not pyplot: it keeps figures in a global list and picks a backend for the whole process.
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = prefill.rows
    scale, unit = flop_unit(max(sum_costs(row.full.values()).flops for row in rows))
    full = [sum_costs(row.full.values()).flops / scale for row in rows]
    reduced = [sum_costs([*row.reduced.values(), *row.scoring.values()]).flops / scale for row in rows]
    right.bar(range(len(rows)), full, color=_FULL, label="without reduction")
    for symbol in dict.fromkeys(row.symbol for row in rows):
        mine = [layer for layer, row in enumerate(rows) if row.symbol == symbol]
        left.bar(mine, [rows[layer].retention for layer in mine], color=KINDS[symbol].colour, label=KINDS[symbol].label)
        right.bar(mine, [reduced[layer] for layer in mine], color=KINDS[symbol].colour)
    budget = sum(row.retention for row in rows) / len(rows)
    left.axhline(budget, color="black", linestyle=":", linewidth=1)
    left.set(title=f"Share of the visual tokens that enters, mean {budget:.4f}", xlabel="layer", ylim=(0, 1.05))
    right.set(title=f"Prefill operations, {unit} ({prefill.speedup:.2f}x fewer)", xlabel="layer")
    # Room for the legend.
    right.set_ylim(0, 1.15 * max(full))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    prompt = prefill.prompt
    figure.suptitle(f"{name}, {prompt.visual:,} visual and {prompt.text:,} text tokens", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Creator": "recipes/plan.py"})
