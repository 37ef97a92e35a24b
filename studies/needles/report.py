"""docs/study.md from the rows: tables, the figure, and the findings that a person wrote beside them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridprune_megatron.evaluation.report import percent
from studies.demo.report import markdown_table
from studies.needles.cells import (
    BUDGETS,
    HEADLINE,
    METHOD_BY_NAME,
    METHODS,
    OURS,
    Method,
    rows_of,
)
from studies.needles.intervals import Estimate, accuracy, difference

Row = dict[str, Any]
#: Methods of the README's table.
_SUMMARY = (OURS, "contrast_attention", "random_all_layers", "random", "pyramiddrop", "evs")


def headline_table(rows: Sequence[Row], timings: dict[str, Row]) -> list[tuple[str, ...]]:
    """Every method at the headline budget, before and after light finetuning; the first row is the header.

    Args:
        rows: of the study.
        timings: prefill by method and budget, see ``timing_key``.
    """
    full = rows_of(rows, "before", "none", 1.0)
    header = ("method", "before", "after, this budget", "after, random budgets", "after, minus every token after")
    table: list[tuple[str, ...]] = [(*header, "ours minus it, after", "prefill, full / reduced")]
    tuned_full = rows_of(rows, "after_fixed", "none", 1.0)
    ours_at_full = _cell(rows_of(rows, "after", OURS, 1.0))
    table.append(("every token", _cell(full), _cell(tuned_full), ours_at_full, "", "", "1.00"))
    for method in METHODS:
        before, fixed, drawn = (
            rows_of(rows, stage, method.name, HEADLINE) for stage in ("before", "after_fixed", "after")
        )
        # Compared with ours after the same kind of finetuning.
        stage = "after_fixed" if fixed else "after"
        ours = rows_of(rows, stage, OURS, HEADLINE)
        table.append(
            (
                method.label,
                _cell(before),
                _cell(fixed),
                _cell(drawn),
                # Finetuned alike: a base that was not would flatter every method.
                _signed(fixed or drawn, tuned_full),
                _signed(ours, fixed or drawn) if method.name != OURS else "",
                _speedup(timings, method, HEADLINE),
            )
        )
    return table


def summary_table(rows: Sequence[Row], timings: dict[str, Row]) -> list[tuple[str, ...]]:
    """The README's choice of the headline table: ours, its control, and the strongest baselines."""
    header, full, *methods = headline_table(rows, timings)
    labels = {METHOD_BY_NAME[name].label for name in _SUMMARY}
    chosen = [row for row in methods if row[0] in labels]
    return [(row[0], row[1], row[2], row[-1]) for row in (header, full, *chosen)]


def budget_table(rows: Sequence[Row], timings: dict[str, Row], stage: str) -> list[tuple[str, ...]]:
    """Accuracy of every method at every budget, with the prefill ratio in parentheses."""
    budgets = sorted(BUDGETS, reverse=True)
    table = [("method", *(f"budget {budget:g}" for budget in budgets))]
    for method in METHODS:
        if method.headline_only:
            continue
        cells = []
        for budget in budgets:
            speed = _speedup(timings, method, budget)
            found = rows_of(rows, "before" if stage == "before" else method.tuned_stage, method.name, budget)
            cells.append(f"{_cell(found)} ({speed} x)" if found and speed else _cell(found))
        table.append((method.label, *cells))
    return table


def kind_table(rows: Sequence[Row], stage: str) -> list[tuple[str, ...]]:
    """Accuracy by kind of question at the headline budget."""
    full = rows_of(rows, "before", "none", 1.0)
    kinds = sorted(full[0]["by_kind"]) if full else []
    table = [("method", *kinds), ("every token, base model", *(_mean_kind(full, kind) for kind in kinds))]
    for method in METHODS:
        found = rows_of(rows, stage, method.name, HEADLINE)
        if found:
            table.append((method.label, *(_mean_kind(found, kind) for kind in kinds)))
    return table


def random_budget_table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One checkpoint for every budget against one finetuned at the headline budget."""
    fixed, drawn = (rows_of(rows, stage, OURS, HEADLINE) for stage in ("after_fixed", "after"))
    return [
        ("finetuned at", f"tested at {HEADLINE:g}", "difference"),
        (f"budget {HEADLINE:g}", _cell(fixed), ""),
        ("random budgets", _cell(drawn), _signed(drawn, fixed)),
    ]


def timing_key(method: str, budget: float) -> str:
    """Name of a measured prefill."""
    return f"{method}/{budget:g}"


def seen_from_above(markdown: str, folder: str) -> str:
    """Markdown of a folder as a page beside that folder has it: relative links lead through it."""
    link = r"\]\((?!https?:|#)([^)]+)\)"
    return re.sub(link, lambda found: f"]({posixpath.normpath(posixpath.join(folder, found[1]))})", markdown)


def write_report(
    path: Path, rows: Sequence[Row], timings: dict[str, Row], setting: str, findings: str, figure: str
) -> None:
    """Writes the page.

    Args:
        path: docs/study.md.
        rows: of the study.
        timings: prefill by ``timing_key``.
        setting: a paragraph on sizes, data, seeds and device.
        findings: Markdown by a person; its links start in the folder ``study`` beside the page.
        figure: relative path of the plot.
    """
    full = rows_of(rows, "before", "none", 1.0)
    title = f"Budget {HEADLINE:g}" + (f", {len(full[0]['correct'])} held-out questions" if full else "")
    parts = [
        "# Study: which visual tokens can go",
        "<!-- Made by `python recipes/study.py`; the findings are docs/study/findings.md. Do not edit by hand. -->",
        setting,
        seen_from_above(findings.strip(), "study"),
        f"## {title}",
        "Accuracy with its 95 % interval (bootstrap over held-out samples); the number of finetuning seeds in brackets "
        "where there is more than one. Differences are paired by sample; bold: beyond their interval.",
        markdown_table(headline_table(rows, timings)),
        f"![Accuracy over budget]({figure})",
        "## Every budget, before finetuning",
        "In parentheses: the measured speedup of the language model's prefill.",
        markdown_table(budget_table(rows, timings, "before")),
        "## Every budget, after light finetuning at random budgets",
        f"What drops only before the model is finetuned at {HEADLINE:g}: it passes on a fixed share.",
        markdown_table(budget_table(rows, timings, "after")),
        f"## By kind of question, budget {HEADLINE:g}, before finetuning",
        markdown_table(kind_table(rows, "before")),
        f"## By kind of question, budget {HEADLINE:g}, after light finetuning at this budget",
        markdown_table(kind_table(rows, "after_fixed")),
        "## One checkpoint for every budget",
        markdown_table(random_budget_table(rows)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    estimate = accuracy(rows)
    seeds = f" [{estimate.seeds}]" if estimate.seeds > 1 else ""
    return f"{percent(estimate.mean)} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f}){seeds}"


def _signed(rows: Sequence[Row], others: Sequence[Row]) -> str:
    if not rows or not others:
        return ""
    gap: Estimate = difference(rows, others)
    text = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.0f} to {100 * gap.high:+.0f})"
    return f"**{text}**" if gap.excludes_zero else text


def _mean_kind(rows: Sequence[Row], kind: str) -> str:
    return percent(sum(row["by_kind"][kind] for row in rows) / len(rows))


def _speedup(timings: dict[str, Row], method: Method, budget: float) -> str:
    found = timings.get(timing_key(method.name, budget))
    return f"{found['full_seconds'] / found['reduced_seconds']:.2f}" if found else ""
