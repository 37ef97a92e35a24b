"""The report of an analysis: JSON with every value, and one HTML file that carries its figures inside."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridprune_megatron.analysis.conclusions import conclusions
from hybridprune_megatron.analysis.figures import plot_exposure, plot_kept, plot_probe, plot_sparsity, plot_stability
from hybridprune_megatron.analysis.probe import READOUTS

JSON_FILE = "analysis.json"
HTML_FILE = "report.html"

_READOUTS = "; ".join(f"{kind} layers, {words}" for kind, words in READOUTS.items())
#: Title and explanation of every section; docs/analysis.md says the same at more length.
SECTIONS: dict[str, tuple[str, str]] = {
    "sparsity": (
        "Layerwise sparsity",
        "Every layer that can score does so with nothing dropped. Left: the smallest share of visual tokens that holds "
        "50, 80 and 95 % of the score mass (sum of absolute scores); evenly spread scores need 50, 80 and 95 % of the "
        "tokens, scores drawn from a normal distribution around 0 about 24, 50 and 75 %. Middle: Gini coefficient "
        "of the same mass (0: all tokens alike, 1: one token has all) and the share of tokens with a negative score. "
        "Right: how often a token of a frame that the answer needs scores above a token of another frame (AUC), where "
        "the data set says which frames these are. Means over clips.",
    ),
    "stability": (
        "Stability of importance",
        "Do two layers rank the same tokens high? Spearman's correlation over all visual tokens, and the share of the "
        "top that both have in common; the same scores as above, means over clips. Layers are sorted by type, so the "
        "blocks on the diagonal are within a type and the others across. What falls with distance makes an early "
        "decision a bad guess of a later one.",
    ),
    "kept": (
        "Where kept tokens lie",
        "Under the model's own reduction: which share of each frame's tokens enters each layer, mean over clips. "
        "Right: the same over the frames that the answer needs, and over all others, where the data set says which "
        "these are. A score that ignores content keeps equal shares of both.",
    ),
    "exposure": (
        "Which layers still read visual tokens",
        "One visual token gets past a layer, and nothing else is dropped: what the first token of the answer loses, as "
        "the divergence (KL, nats) from its distribution with every token. Mean and median over clips. Where both are "
        "nearly 0, nothing after the layer reads visual tokens any more, and a schedule may end.",
    ),
    "probe": (
        "What a dropped token leaves behind",
        "The tokens of some frames (the needle's; in data without needles the second quarter) are dropped right after "
        "one layer and nothing else anywhere. A ridge regression then predicts what they showed from one read-out of "
        f"a later layer: {_READOUTS}. The answer is cut off. Left: one line per drop. Middle: the same as numbers, "
        "with two references: with nothing dropped, and with the tokens taken out before the LM, so that only the rest "
        "of the clip and the question can give them away. Right: clips grouped by how long before the end the tokens "
        "were shown. Grey: what 95 % of probes with shuffled targets stay below; scores in it mean nothing. Read-outs "
        "differ in size, so compare each type with its own references, not with the other type's height.",
    ),
    "strips": (
        "Patch by patch",
        "One clip each under the model's own reduction, from top to bottom with depth. A grey patch has been dropped "
        "before this layer.",
    ),
}
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } figure { margin: 0; flex: 1 } .both { display: flex; gap: 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: 0.15em 0.9em 0.15em 0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #999 }
"""


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all; what is not a number becomes null, for JSON has no nan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n")
    scratch.replace(path)


def finite(values: Any) -> Any:
    """The same with None for what is not a number."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_figures(out: Path, result: dict[str, Any]) -> None:
    """The figures of everything but the strips, which need pixels."""
    symbols = result["run"]["layers"]
    plot_sparsity(out / "sparsity.png", result["sparsity"], symbols)
    plot_stability(out / "stability.png", result["stability"], symbols)
    plot_kept(out / "kept.png", result["kept"], symbols, result["run"]["retention_by_layer"])
    if result["exposure"] is not None:
        plot_exposure(out / "exposure.png", result["exposure"], symbols)
    if result["probe"] is not None:
        plot_probe(out / "probe.png", result["probe"], symbols)


def write_html(out: Path, result: dict[str, Any]) -> Path:
    """One file that needs no other, from ``analysis.json``'s values and the figures in ``out``."""
    run = result["run"]
    parts = [
        f"<h1>Analysis of {html.escape(str(run['checkpoint']))}</h1>",
        '<h2 id="conclusion">In short</h2>',
        "<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in conclusions(result)) + "</ul>",
        table([("", ""), *((name.replace("_", " "), text(value)) for name, value in run.items())]),
    ]
    figures = {name: [f"{name}.png"] for name in ("sparsity", "stability", "kept", "exposure", "probe")}
    figures["strips"] = result["strips"]
    tables: dict[str, Callable[[Any], str]] = {
        "sparsity": _sparsity_table,
        "stability": _stability_table,
        "probe": _probe_table,
    }
    for name, (title, words) in SECTIONS.items():
        if result[name]:
            parts += [f'<h2 id="{name}">{title}</h2>', f"<p>{words}</p>"]
            parts += [image(out / file, title) for file in figures[name]]
            if name in tables:
                parts.append(tables[name](result[name]))
    path = out / HTML_FILE
    path.write_text(page("Analysis", parts))
    return path


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML page that needs no other file."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body>\n{body}\n</body></html>\n"
    )


def image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'


def _sparsity_table(rows: Sequence[dict[str, Any]]) -> str:
    shares = list(rows[0]["tokens_that_hold"])
    header = ("layer", "type", *(f"{float(share):.0%} of the mass" for share in shares), "Gini", "negative", "AUC")
    lines = [
        (str(row["layer"]), row["type"], *(text(row["tokens_that_hold"][share]) for share in shares),
         *(text(row[name]) for name in ("gini", "negative", "auc")))
        for row in rows
    ]  # fmt: skip
    return table([header, *lines])


def _stability_table(stability: dict[str, Any]) -> str:
    header = ("pairs of layers", "number", "Spearman", f"overlap of the top {stability['top']:.0%}")
    lines = [
        (name, str(pair["pairs"]), text(pair["spearman"]), text(pair["overlap"]))
        for name, pair in stability["by_type"].items()
    ]
    return table([header, *lines])


def _probe_table(probe: dict[str, Any]) -> str:
    header = ("content", "read at", "dropped after", "layers after", "dropped", "nothing dropped", "never entered")
    lines = [
        (content, kind, *(text(row[key]) for key in ("dropped_after", "layers", "score", "held", "absent")))
        for content, found in probe["contents"].items()
        for kind, rows in found["by_drop"].items()
        for row in rows
    ]
    return f"<p>{probe['samples']} clips; means over the layers after each drop.</p>" + table([header, *lines])


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first row is its header. Columns without any value are left out."""
    told = [any(row[column] not in ("-", "") for row in rows[1:]) for column in range(len(rows[0]))]
    header, *body = [[cell for cell, keep in zip(row, told) if keep] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"] if any(header) else []
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def text(value: Any) -> str:
    """A value as a table shows it; a dash for what is not known."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(text(each) for each in value)
    return "-" if value is None else str(value)
