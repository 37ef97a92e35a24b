"""The figures of an analysis, from the values that are in its JSON. Colours are safe for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hybridprune_megatron.analysis.probe import IN_FRONT
from hybridprune_megatron.evaluation.figure import NEEDED_COLOUR, layer_name, new_figure
from hybridprune_megatron.layers.kinds import KINDS

TYPE_COLOURS = {kind.name: kind.colour for kind in KINDS.values() if kind.scores}
#: Okabe and Ito, for pairs of layers: within Mamba and within attention as these, across as none.
_PAIR_COLOURS = {"mamba-mamba": "#0072B2", "attention-attention": "#D55E00", "attention-mamba": "#CC79A7"}
_MASS_MARKERS = ("o", "s", "^")
# Shares are drawn by their power, so that few per cent can be told from none.
_OTHERS_COLOUR = "#56B4E9"
_KEPT_GAMMA = 0.4
_KEPT_TICKS = (0, 0.01, 0.03, 0.1, 0.25, 0.5, 1)
_TYPE_MARKERS = {"mamba": "o", "attention": "D"}
_HELD, _DROPPED, _ABSENT = ("--^", "nothing dropped"), ("-o", "dropped"), (":s", "never entered")
# More layers than this get no numbers in the cells of a heat map.
_MOST_NUMBERED = 12
# More ticks than this on an axis cannot be read.
_MOST_TICKS = 24
CONTENT_NAMES = {
    "feature": ("mean feature of the dropped tokens", "R\N{SUPERSCRIPT TWO} on unseen clips"),
    "label": ("label of the needle", "accuracy on unseen clips"),
}


def plot_sparsity(path: Path, rows: Sequence[dict[str, Any]], symbols: str) -> None:
    """Share of tokens that hold the score mass, Gini and negative scores, AUC if known; a column a scoring layer."""
    known = any(row["auc"] is not None for row in rows)
    figure = new_figure(15 if known else 10, 4.4)
    left, middle, *right = figure.subplots(1, 3 if known else 2)
    layers = range(len(rows))
    shares = list(rows[0]["tokens_that_hold"])
    for kind, colour in TYPE_COLOURS.items():
        mine = [x for x in layers if rows[x]["type"] == kind]
        for share, marker in zip(shares, _MASS_MARKERS):
            values = _floats([rows[x]["tokens_that_hold"][share] for x in mine])
            left.plot(mine, values, marker, color=colour, label=f"{float(share):.0%} of the mass, {kind}")
        middle.bar(mine, _floats([rows[x]["gini"] for x in mine]), color=colour, label=f"Gini, {kind}")
        for axes in right:
            axes.plot(mine, _floats([rows[x]["auc"] for x in mine]), "o", color=colour, label=f"AUC, {kind}")
    lowest, highest = (_floats([row["tokens_that_hold"][share] for row in rows]) for share in (shares[0], shares[-1]))
    left.vlines(layers, lowest, highest, color="#BBBBBB", linewidth=1, zorder=0)
    left.set(title="Visual tokens that hold the score mass", ylabel="share of the visual tokens")
    negative = _floats([row["negative"] for row in rows])
    middle.plot(layers, negative, "D", color="black", markerfacecolor="white", label="share of negative scores")
    middle.set(title="Concentration of the scores", ylabel="Gini coefficient; share of tokens")
    for axes in right:
        axes.axhline(0.5, color="black", linestyle=":", linewidth=1, label="a score that knows nothing")
        axes.set(title="Do frames that the answer needs score higher?", ylabel="AUC of their tokens against all others")
    for axes in (left, middle, *right):
        axes.set(xlabel="layer that scores, nothing dropped", ylim=(-0.02, 1.02))
        _layer_ticks(axes, [row["layer"] for row in rows], symbols)
        _legend_below(axes)
    _save(figure, path)


def plot_stability(path: Path, stability: dict[str, Any], symbols: str) -> None:
    """Rank correlation and overlap of the top between layers, and both against their distance."""
    layers = stability["layers"]
    # By type, so that the blocks of the heat map are: within one type, across types.
    order = sorted(range(len(layers)), key=lambda index: (symbols[layers[index]] != "M", layers[index]))
    boundary = sum(symbols[layers[index]] == "M" for index in order)
    figure = new_figure(16, 5)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    top = stability["top"]
    panels = {
        "spearman": (left, "Spearman's rank correlation", "PuOr", -1, 1),
        "overlap": (middle, f"Tokens in both tops of {top:.0%} (by chance {top:.2f})", "cividis", 0, 1),
    }
    for name, (axes, title, colours, low, high) in panels.items():
        values = _floats(stability[name])[np.ix_(order, order)]
        image = axes.imshow(values, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(image, ax=axes, shrink=0.85)
        _numbers(axes, values, image)
        for place in (axes.axhline, axes.axvline):
            place(boundary - 0.5, color="white", linewidth=2)
        _layer_ticks(axes, [layers[index] for index in order], symbols)
        _layer_ticks(axes, [layers[index] for index in order], symbols, vertical=True)
        axes.set(title=title, xlabel="layer (Mamba, then attention)", ylabel="layer (Mamba, then attention)")
    for name, rows in stability["by_distance"].items():
        distance = [row["distance"] for row in rows]
        colour = _PAIR_COLOURS[name]
        right.plot(distance, _floats([row["spearman"] for row in rows]), "-o", color=colour, label=f"Spearman, {name}")
        overlap = _floats([row["overlap"] for row in rows])
        right.plot(distance, overlap, "--s", color=colour, markerfacecolor="white", label=f"overlap, {name}")
    right.axhline(top, color="black", linestyle=":", linewidth=1, label="overlap by chance")
    right.set(title="Against distance in depth", xlabel="layers between the two", ylabel="mean over pairs of layers")
    _legend_below(right)
    _save(figure, path)


def plot_exposure(path: Path, rows: Sequence[dict[str, Any]], symbols: str) -> None:
    """What the answer loses if no more than one visual token gets past a layer; a bar per layer."""
    figure = new_figure(9, 4)
    axes = figure.subplots()
    layers = range(len(rows))
    for kind, colour in TYPE_COLOURS.items():
        mine = [x for x in layers if rows[x]["type"] == kind]
        axes.bar(mine, _floats([rows[x]["kl"] for x in mine]), color=colour, label=f"mean, {kind}")
    axes.plot(layers, _floats([row["median"] for row in rows]), "D", color="black", markersize=5, label="median")
    axes.set(
        title="One visual token gets past the layer", xlabel="layer", ylabel="KL of the answer's first token (nats)"
    )
    _layer_ticks(axes, [row["layer"] for row in rows], symbols)
    _legend_below(axes)
    _save(figure, path)


def plot_kept(path: Path, kept: dict[str, Any], symbols: str, retention: Sequence[float]) -> None:
    """Share of each frame's tokens that enter each layer; frames that the answer needs against all others."""
    needed = kept["needed_frames"]
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    # Deep layers keep a few per cent: spread out what is small.
    scale = PowerNorm(_KEPT_GAMMA, 0, 1)
    image = left.imshow(_floats(kept["by_layer_and_frame"]), cmap="cividis", norm=scale, aspect="auto")
    figure.colorbar(image, ax=left, label="share of the frame's tokens", ticks=_KEPT_TICKS, format="%g")
    _layer_ticks(left, range(len(symbols)), symbols, vertical=True)
    left.set(title="Tokens that enter each layer, over time", xlabel="frame of the clip", ylabel="layer")
    layers = range(len(symbols))
    right.plot(layers, retention, "_", color="black", markersize=12, label="schedule")
    if needed is not None:
        right.plot(layers, _floats(needed["inside"]), "-o", color=NEEDED_COLOUR, label="frames that the answer needs")
        right.plot(layers, _floats(needed["outside"]), "-s", color=_OTHERS_COLOUR, label="all other frames")
    else:
        share = np.nanmean(_floats(kept["by_layer_and_frame"]), 1)
        right.plot(layers, share, "-s", color=_OTHERS_COLOUR, label="all frames")
    right.set_yscale(
        "function", functions=(lambda y: y.clip(0) ** _KEPT_GAMMA, lambda y: y.clip(0) ** (1 / _KEPT_GAMMA))
    )
    right.set_yticks(_KEPT_TICKS, [f"{tick:g}" for tick in _KEPT_TICKS])
    right.set(title="Share that enters each layer", xlabel="layer", ylabel="share of the tokens", ylim=(0, 1.04))
    _layer_ticks(right, layers, symbols)
    right.grid(axis="y", color="#DDDDDD")
    _legend_below(right)
    _save(figure, path)


def plot_probe(path: Path, probe: dict[str, Any], symbols: str) -> None:
    """What is recovered of dropped tokens: by layers since the drop, for every pair of layers, by time since shown."""
    contents = probe["contents"]
    figure = new_figure(16, 5.2 * len(contents))
    for row, (name, found) in zip(figure.subplots(len(contents), 3, squeeze=False, width_ratios=(1, 1.3, 0.9)),
                                  contents.items()):  # fmt: skip
        title, unit = CONTENT_NAMES[name]
        high = max(
            _floats([each["shuffled_high"] for each in found["rows"] if each["shuffled_high"] is not None] or [0])
        )
        _plot_since(row[0], found["rows"], symbols, title, unit, high)
        _plot_pairs(row[1], found["rows"], symbols, unit)
        _plot_times(row[2], found["rows"], probe["time_bins"], unit, high)
    _save(figure, path)


def _plot_since(axes: Axes, rows: Sequence[dict[str, Any]], symbols: str, title: str, unit: str, high: float) -> None:
    drops = sorted({row["dropped_after"] for row in rows if row["dropped_after"] not in (None, IN_FRONT)})
    for number, after in enumerate(drops):
        behind = sorted((row for row in rows if row["dropped_after"] == after), key=lambda row: row["layer"])
        colour = colormaps["viridis"](number / max(len(drops), 1))
        distance = [row["layer"] - after for row in behind]
        name = f"dropped after {layer_name(after, symbols)}"
        axes.plot(distance, _floats([row["score"] for row in behind]), color=colour, label=name)
        for row in behind:
            marker = _TYPE_MARKERS[row["type"]]
            axes.plot(row["layer"] - after, _floats(row["score"]), marker, color=colour)
    for kind, marker in _TYPE_MARKERS.items():
        axes.plot([], [], marker, color="black", label=f"read at {kind}")
    _shuffled(axes, high)
    axes.set(title=f"Probe for the {title}", xlabel="layers since the drop (1 = right after it)", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axes)


def _plot_pairs(axes: Axes, rows: Sequence[dict[str, Any]], symbols: str, unit: str) -> None:
    known = {(row["dropped_after"], row["layer"]): row["score"] for row in rows}
    columns = sorted({row["layer"] for row in rows})
    drops = sorted({row["dropped_after"] for row in rows if row["dropped_after"] is not None})
    table = [[known.get((after, layer), np.nan) for layer in columns] for after in drops]
    table.append([known[None, layer] for layer in columns])
    values = _floats(table)
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=min(0.0, np.nanmin(values)))
    axes.figure.colorbar(image, ax=axes, label=unit)
    _numbers(axes, values, image)
    _layer_ticks(axes, columns, symbols)
    names = ["before the LM" if after == IN_FRONT else f"after {layer_name(after, symbols)}" for after in drops]
    axes.set_yticks(range(len(names) + 1), [*names, "never"])
    axes.set(title="Every drop and every later layer", xlabel="layer that is read", ylabel="tokens dropped")


def _plot_times(
    axes: Axes, rows: Sequence[dict[str, Any]], bins: Sequence[dict[str, Any]], unit: str, high: float
) -> None:
    names = ["{} to {}\n({} clips)".format(*group["frames"], group["samples"]) for group in bins]
    for kind in sorted({row["type"] for row in rows}):
        mine = [row for row in rows if row["type"] == kind]
        groups = {
            _HELD: [row for row in mine if row["dropped_after"] is None],
            _DROPPED: [row for row in mine if row["dropped_after"] not in (None, IN_FRONT)],
            _ABSENT: [row for row in mine if row["dropped_after"] == IN_FRONT],
        }
        for (style, name), chosen in groups.items():
            values = _floats([row["by_time"] for row in chosen]).mean(0)
            axes.plot(range(len(bins)), values, style, color=TYPE_COLOURS[kind], label=f"{kind}: {name}")
    _shuffled(axes, high)
    axes.set_xticks(range(len(bins)), names)
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.set(title="By time since they were shown", ylabel=f"{unit}, mean over layers",
             xlabel="frames from the last dropped one to the end")  # fmt: skip
    _legend_below(axes)


def _shuffled(axes: Axes, high: float) -> None:
    axes.axhspan(min(0.0, axes.get_ylim()[0]), high, color="#DDDDDD", zorder=0, label="95 % of shuffled targets")


def _layer_ticks(axes: Axes, layers: Sequence[int], symbols: str, vertical: bool = False) -> None:
    step = -(-len(layers) // _MOST_TICKS)
    places = list(range(0, len(layers), step))
    names = [layer_name(layers[place], symbols, " " if vertical else "\n") for place in places]
    (axes.set_yticks if vertical else axes.set_xticks)(places, names)
    for label, place in zip((axes.get_yticklabels if vertical else axes.get_xticklabels)(), places):
        label.set_color(KINDS[symbols[layers[place]]].colour)


def _numbers(axes: Axes, values: np.ndarray, image: Any) -> None:
    """The value in every cell, in black or white, whichever can be read on its colour."""
    if max(values.shape) > _MOST_NUMBERED:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip


def _floats(values: Any) -> np.ndarray:
    """None, which JSON has for what is not defined, becomes nan."""
    return np.array(values, dtype=float)


def _legend_below(axes: Axes, below: float = 0.22) -> None:
    """Legend under the plot and its labels, where it hides nothing; no frame on top and right."""
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -below), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
