"""Two analyses on one page: their figures side by side, and what differs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hybridprune_megatron.analysis.conclusions import conclusions, known_mean
from hybridprune_megatron.analysis.figures import TYPE_COLOURS
from hybridprune_megatron.analysis.report import JSON_FILE, SECTIONS, image, page, table, text
from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.evaluation.figure import new_figure
from hybridprune_megatron.evaluation.intervals import bootstrap

#: What the page calls the two.
_NAMES = ("A", "B")
#: Hollow and filled: colours say which kind of layer.
_MARKERS = (("o", "white"), ("s", None))
_PICTURES = ("sparsity", "stability", "kept", "exposure", "probe")


def read_analysis(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An analysis: its folder and its values.

    Args:
        folder: that ``hybridprune analyze`` wrote, or a run's that holds it as ``analysis``.

    Raises:
        ValueError: there is none, or one of an earlier version.
    """
    found = next((each for each in (folder, folder / "analysis") if (each / JSON_FILE).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: no {JSON_FILE} there, nor in its analysis/; run hybridprune analyze first")
    result = read_json(found / JSON_FILE)
    if not isinstance(result, dict) or not {"run", *SECTIONS, "clips"} <= set(result):
        raise ValueError(f"{found / JSON_FILE}: not an analysis that can be compared; run hybridprune analyze again")
    return found, result


def compare(
    folders: tuple[Path, Path], results: tuple[dict[str, Any], dict[str, Any]], made_by: str
) -> tuple[str, int]:
    """The page, which needs no other file, and the number of clips that both analyses have.

    Args:
        folders: of the two analyses, with their figures.
        results: of their JSON files.
        made_by: the command, which the page names.
    """
    rows, clips = differences(*results)
    about = f"Differences are B less A with their 95 % intervals over the {clips} clips that both have."
    if not clips:
        about = "The two have no clip in common, so there are no intervals of the differences."
    parts = [
        f"<h1>{html.escape(f'{folders[0]} (A) and {folders[1]} (B)')}</h1>",
        _settings(results),
        '<h2 id="differences">What differs</h2>',
        f"<p>{about} One whose interval holds 0 is within chance.</p>",
        table(rows),
    ]
    if results[0]["run"]["layers"] == results[1]["run"]["layers"]:
        parts.append(f'<img alt="Layer by layer" src="data:image/png;base64,{_drawn(results)}">')
    for name, result in zip(_NAMES, results):
        said = "".join(f"<li>{html.escape(each)}</li>" for each in conclusions(result))
        parts.append(f"<h2>{name} in short</h2><ul>{said}</ul>")
    for name in _PICTURES:
        if all((folder / f"{name}.png").is_file() for folder in folders):
            title = SECTIONS[name][0]
            shown = [image(folder / f"{name}.png", f"{title}, {run}") for folder, run in zip(folders, _NAMES)]
            both = "".join(f"<figure><figcaption>{run}</figcaption>{each}</figure>" for run, each in zip(_NAMES, shown))
            parts.append(f'<h2 id="{name}">{title}</h2><div class="both">{both}</div>')
    parts.append(f"<p>Made by {made_by}.</p>")
    return page("Two analyses", parts), clips


def differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[tuple[str, ...]], int]:
    """Rows of a table, the first its header, and the number of clips that both analyses have.

    Each row has the mean of each analysis over its clips. The difference is paired: over the clips of both, by key.
    """
    of_a, of_b = ({clip["key"]: clip for clip in each["clips"]} for each in (a, b))
    common = [key for key in of_a if key in of_b] if a["run"]["data"] == b["run"]["data"] else []
    rows: list[tuple[str, ...]] = [("", *_NAMES, "difference", "95 % interval")]
    for name, read in _figures(a, b).items():
        means = [known_mean([read(clip) for clip in clips.values()]) for clips in (of_a, of_b)]
        pairs = [(read(of_a[key]), read(of_b[key])) for key in common]
        gaps = np.array([second - first for first, second in pairs if first is not None and second is not None])
        told, span = "-", "-"
        if len(gaps):
            gap = bootstrap(gaps)
            told, span = f"{gap.mean:+.4f}", f"{gap.low:+.4f} to {gap.high:+.4f}"
        elif None not in means:
            told = f"{means[1] - means[0]:+.4f}"  # type: ignore[operator]  # neither is None
        rows.append((name, *("-" if mean is None else f"{mean:.4f}" for mean in means), told, span))
    return rows, len(common)


def _figures(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], float | None]]:
    """What is compared, by name: a number of a clip's row."""
    kinds = sorted({row["type"] for each in (a, b) for row in each["sparsity"]})
    found: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "visual tokens kept, mean over layers": lambda clip: clip["kept"],
        "of frames that the answer needs": lambda clip: clip["inside"],
        "of all other frames": lambda clip: clip["outside"],
    }
    for kind in kinds:
        found[f"AUC of needed frames, {kind} layers"] = lambda clip, kind=kind: clip["auc"].get(kind)  # type: ignore[misc]
        found[f"tokens that hold half of the mass, {kind} layers"] = lambda clip, kind=kind: clip["half"].get(kind)  # type: ignore[misc]
    return found


def _settings(results: tuple[dict[str, Any], dict[str, Any]]) -> str:
    names = [name for name in results[0]["run"] if name in results[1]["run"]]
    rows = [(name.replace("_", " "), *(text(each["run"][name]) for each in results)) for name in names]
    return table([("", *_NAMES), *(row for row in rows if len(row[1]) < 80)])


def _drawn(results: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """A PNG in base64: layer by layer, both analyses in one picture."""
    known = all(any(row["auc"] is not None for row in each["sparsity"]) for each in results)
    panels = {"share of the tokens that holds half of the mass": lambda row: row["tokens_that_hold"]["0.5"]}
    if known:
        panels["AUC of frames that the answer needs"] = lambda row: row["auc"]
    figure = new_figure(6 * len(panels), 3.6)
    for axes, (title, read) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        for name, result, (marker, face) in zip(_NAMES, results, _MARKERS):
            for kind, colour in TYPE_COLOURS.items():
                mine = [row for row in result["sparsity"] if row["type"] == kind]
                values = np.array([read(row) for row in mine], dtype=float)
                layers = [row["layer"] for row in mine]
                axes.plot(layers, values, marker, color=colour, markerfacecolor=face or colour, label=f"{name}, {kind}")
        axes.set(title=title, xlabel="layer", ylim=(-0.02, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return base64.b64encode(content.getvalue()).decode("ascii")
