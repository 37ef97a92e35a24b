"""The report of a demo run as tables: plain text for the terminal, Markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What, before finetuning, after it, and a remark; the first row is the header."""
    accuracy, seconds = report["accuracy"], report["prefill_seconds"]
    first, last = report["loss_first"], report["loss_last"]
    budget, samples = report["budget"], report["held_out_samples"]
    return [
        ("", "before", "after", ""),
        (
            f"accuracy, budget {budget:g}",
            percent(accuracy["reduced_before"]),
            percent(accuracy["reduced_after"]),
            f"{samples} held-out questions, chance {percent(accuracy['chance'])}",
        ),
        ("accuracy, nothing dropped", percent(accuracy["full_before"]), percent(accuracy["full_after"]), ""),
        ("loss per answer token", f"{first:.3f}", f"{last:.3f}", f"first and last of {report['steps']} steps"),
        ("mean retention, measured", "", f"{report['mean_retention']:.4f}", f"budget {budget:g}"),
        (
            "prefill seconds, full and reduced",
            f"{seconds['full']:.3f}",
            f"{seconds['reduced']:.3f}",
            f"of which vision {seconds['vision']:.3f}; {report['timing']['num_samples']} clips, "
            f"{report['timing']['threads']} threads",
        ),
        (
            "export, largest logit difference",
            "",
            f"{report['export_max_abs_logit_diff']:.1e}",
            "training model against exported one, reduced, fp32",
        ),
    ]


def percent(share: float) -> str:
    """0.256 as "25.6 %"."""
    return f"{100 * share:.1f} %"


def text_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; the first and the last to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < column < len(row) - 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """The same as a Markdown table."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, f"|{' --- |' * len(rows[0])}", *body])
