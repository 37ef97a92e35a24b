"""The page and the picture of benchmark reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from hybridprune_megatron.evaluation.figure import new_figure

Report = Mapping[str, Any]

_COLOURS = {"full": "#0072B2", "reduced": "#D55E00", "transformers": "#999999"}
_HEAD = """# Performance

<!-- Made by `python recipes/benchmark.py --page` from docs/performance/*.json. Do not edit by hand. -->

The language model alone, random weights and embeddings, one sample; medians, candidates measured in turn. *Limit* is
the ratio of counted operations ([analysis.md](analysis.md#what-is-counted)). Before anything is timed, logits are
compared: with transformers', and the reduced model's with its own layers run one by one.
"""
_NO_GPU = """
Not measured on a GPU: none was available. `make bench` on one measures prefill at the 12B model's dimensions, FP8
against bf16, and every operator's share of the copy bandwidth.
"""


def headline_rows(report: Report) -> list[tuple[str, str, str]]:
    """What was measured, its value, and the ratio that counted operations allow, where there is one."""
    rows = [
        ("prefill, full over reduced", report["prefill_speedup"], report["prefill_limit"]),
        ("scoring, share of full prefill", report["scoring_share"], None),
        ("prefill, transformers over full", report["prefill_vs_transformers"], None),
        ("training step, full over reduced", report["train_step_speedup"], report["train_limit"]),
        ("activations, reduced over full", report["activation_memory_ratio"], None),
        ("decoding, full over reduced", report["decode_speedup"], None),
    ]
    return [
        (name, "not measured" if value is None else f"{value:.3f}", "" if limit is None else f"{limit:.2f}")
        for name, value, limit in rows
    ]


def headline(report: Report) -> list[str]:
    """The ratios in lines for a terminal."""
    return [
        f"{name:<34}{value:>12}" + (f"  (by operations {limit})" if limit else "")
        for name, value, limit in headline_rows(report)
    ]


def write_page(page: Path, folder: Path) -> None:
    """docs/performance.md from all kept reports."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [_HEAD if any("steps" in report for report in reports.values()) else _HEAD + _NO_GPU]
    for name, report in reports.items():
        shown = _day_one if "steps" in report else _operators if "rows" in report else _section
        parts += shown(name, report)
    page.write_text("\n".join(parts) + "\n", encoding="ascii")


def _day_one(name: str, report: Report) -> Iterable[str]:
    """The steps of scripts/gpu_day_one.sh, and what those of them measured that time something."""
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    yield f"## {name}\n"
    yield f"{report['device']}; {versions}. `{report['command']}`, {report['date']}\n"
    yield from _table_head("step", "result", "seconds", "")
    figures: dict[str, Any] = {}
    for step in report["steps"]:
        said = step["said"].replace("|", "/")
        yield f"| {step['name']} | {step['status']} | {step['seconds']:.0f} | {said} |"
        figures |= step["figures"]
    yield ""
    # Under this section, with the machine that measured them.
    if "kernels" in figures:
        yield from _operators(f"{name}: operators", figures["kernels"])
    if "report" in figures:
        yield from _section(f"{name}: prefill", figures["report"])


def _operators(name: str, report: Report) -> Iterable[str]:
    """The native operators, from kernels/bench.py."""
    versions = report["versions"]
    yield f"## {name}\n"
    yield (
        f"Native operators at the sizes of one layer of the 12B model, {report['dtype'].removeprefix('torch.')}, "
        f"{report['question']} query tokens. {report['device']}, {report['threads']} threads, copy bandwidth "
        f"{report['copy_bytes_per_second'] / 1e9:.1f} GB/s; torch {versions['torch']}. `{report['command']}`\n"
    )
    yield from _table_head(
        "operator", "tokens", "ms", "plain torch / native", "unfused torch / native", "MB", "share of copy bandwidth"
    )
    for row in report["rows"]:
        native = row["native"]
        unfused = f"{row['unfused'] / native:.1f}" if row["unfused"] else "too large"
        yield (
            f"| {row['operator']} | {row['length']:,} | {1e3 * native:.2f} | {row['plain'] / native:.1f} | "
            f"{unfused} | {row['num_bytes'] / 1e6:.1f} | {row['share']:.0%} |"
        )
    yield ""


def _section(name: str, report: Report) -> Iterable[str]:
    settings, machine = report["settings"], report["device"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    yield f"## {name}\n"
    yield (
        f"Model `{settings['model']}` ({settings['pattern']}, hidden size {settings['hidden_size']}, "
        f"{settings['parameters']:,} parameters, {settings['precision']}), budget {settings['budget']:g} of "
        f"`{settings['scorer']}`, {settings['text_tokens']} text tokens. {machine['device']}, "
        f"{settings['threads']} threads; {versions}. `{settings['command']}`\n"
    )
    columns = ("visual tokens", "full, s", "reduced, s", "full / reduced", "limit", "scoring, share of full")
    yield from _table_head(*columns, "transformers, s", "transformers / full")
    for row in report["prefill"]:
        peer, ratio = row["seconds"].get("transformers"), row["vs_transformers"]
        yield (
            f"| {row['visual_tokens']:,} | {row['seconds']['full']:.3f} | {row['seconds']['reduced']:.3f} | "
            f"**{row['speedup']:.2f}** | {row['limit']:.2f} | {row['scoring_share']:.2%} | "
            + (f"{peer:.3f} | {ratio:.2f} |" if peer else "not measured | |")
        )
    yield ""
    yield from _decoding(report["prefill"])
    if report["train"] is None:
        return
    train = report["train"]
    measures = ("activations full, MiB", "reduced, MiB", "reduced / full")
    yield from _table_head(
        "training step, visual tokens", "full, s", "reduced, s", "full / reduced", "limit", *measures
    )
    mib = {key: value / 2**20 for key, value in train["activation_bytes"].items()}
    yield (
        f"| {train['visual_tokens']:,} | {train['seconds']['full']:.3f} | {train['seconds']['reduced']:.3f} | "
        f"**{report['train_step_speedup']:.2f}** | {report['train_limit']:.2f} | {mib['full']:.0f} | "
        f"{mib['reduced']:.0f} | **{report['activation_memory_ratio']:.2f}** |\n"
    )


def _decoding(rows: Sequence[Report]) -> Iterable[str]:
    """Milliseconds a token, where they were measured."""
    if not any(row["decode_seconds"] for row in rows):
        return
    yield from _table_head(
        "decoding after visual tokens", "full, ms a token", "reduced, ms", "full / reduced", "transformers, ms"
    )
    for row in rows:
        taken = {name: 1e3 * seconds for name, seconds in row["decode_seconds"].items()}
        peer = f"{taken['transformers']:.2f}" if "transformers" in taken else "not measured"
        yield (
            f"| {row['visual_tokens']:,} | {taken['full']:.2f} | {taken['reduced']:.2f} | "
            f"{taken['full'] / taken['reduced']:.2f} | {peer} |"
        )
    yield ""


def _table_head(*columns: str) -> Iterable[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)


def plot_prefill(path: Path, report: Report) -> None:
    """Seconds of a prefill over the visual tokens, and how many times as fast the reduced one is."""
    figure = new_figure(10, 4, dpi=120)
    left, right = figure.subplots(1, 2)
    rows: Sequence[Report] = report["prefill"]
    tokens = [row["visual_tokens"] for row in rows]
    for name, colour in _COLOURS.items():
        points = [(n, row["seconds"][name]) for n, row in zip(tokens, rows) if name in row["seconds"]]
        if points:
            left.plot(*zip(*points), marker="o", color=colour, label=name)
    left.set(
        xscale="log", yscale="log", xlabel="visual tokens", ylabel="seconds", title="Prefill of the language model"
    )
    left.legend(frameon=False)
    right.plot(tokens, [row["speedup"] for row in rows], marker="o", color=_COLOURS["reduced"], label="measured")
    right.plot(tokens, [row["limit"] for row in rows], linestyle=":", color="black", label="by operations")
    right.set(xscale="log", xlabel="visual tokens", ylabel="full / reduced", ylim=(0, None), title="Speedup")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Creator": "recipes/benchmark.py"})
