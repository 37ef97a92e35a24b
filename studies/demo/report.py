"""The report of a demo run as a table, and tables in Markdown for the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridprune_megatron.evaluation.report import percent


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


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is the header."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, f"|{' --- |' * len(rows[0])}", *body])
