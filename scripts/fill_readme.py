"""Writes the table of the committed demo report, docs/demo_report.json, into README.md.

cp runs/demo/report.json docs/demo_report.json && python scripts/fill_readme.py
"""

from __future__ import annotations

import json
from pathlib import Path

from hybridprune_megatron.evaluation.report import markdown_table, summary_rows

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "demo_report.json"
README = ROOT / "README.md"
_BEGIN = (
    "<!-- demo report: begin. Filled from docs/demo_report.json by scripts/fill_readme.py; do not edit by hand. -->\n"
)
_END = "<!-- demo report: end -->"


def filled(readme: str) -> str:
    """The README's text with the table of the committed report between its two marks."""
    report = json.loads(REPORT.read_text())
    before, _, rest = readme.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"{README.name} lacks the marks {_BEGIN.strip()} and {_END}; put them back")
    made = f"`make demo`, {report['seconds']['total'] / 60:.1f} minutes on {report['device']}, {report['date']}."
    return f"{before}{_BEGIN}{markdown_table(summary_rows(report))}\n\n{made}\n{_END}{after}"


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    print(f"{README.name} shows {REPORT.relative_to(ROOT)}")
