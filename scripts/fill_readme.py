"""Writes the tables of the committed study, benchmark and demo report into README.md.

python recipes/study.py --report && python scripts/fill_readme.py
python recipes/benchmark.py --keep cpu && python scripts/fill_readme.py
cp runs/demo/report.json docs/demo_report.json && python scripts/fill_readme.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.evaluation.performance_page import headline_rows

ROOT = Path(__file__).resolve().parents[1]
# The studies are not installed.
sys.path.insert(0, str(ROOT))

from studies.demo.report import markdown_table, summary_rows  # noqa: E402
from studies.needles.cells import HEADLINE  # noqa: E402
from studies.needles.report import summary_table  # noqa: E402
from studies.needles.rows import Rows  # noqa: E402

REPORT = ROOT / "docs" / "demo_report.json"
README = ROOT / "README.md"
STUDY = ROOT / "docs" / "study"
SPEED = ROOT / "docs" / "performance" / "cpu.json"


def filled(readme: str) -> str:
    """The README's text with the tables of the committed results between their marks."""
    for name, block in (("demo report", demo_block()), ("study", study_block()), ("speed", speed_block())):
        readme = between_marks(readme, name, block)
    return readme


def demo_block() -> str:
    """Table and provenance of the committed demo run."""
    report = json.loads(REPORT.read_text())
    made = f"`make demo`, {report['seconds']['total'] / 60:.1f} minutes on {report['device']}, {report['date']}."
    return f"{markdown_table(summary_rows(report))}\n\n{made}\n"


def study_block() -> str:
    """The study's headline for the methods that people know."""
    rows, timings = (Rows.read(STUDY / name) for name in ("rows.jsonl", "prefill.jsonl"))
    samples = next(iter(rows.values()))["settings"]["samples"]
    made = f"`python recipes/study.py`, budget {HEADLINE:g}, {samples} held-out questions; all of it in docs/study.md."
    return f"{markdown_table(summary_table(list(rows.values()), timings))}\n\n{made}\n"


def speed_block() -> str:
    """The benchmark's ratios at its greatest length on a CPU."""
    report = json.loads(SPEED.read_text())
    settings, device = report["settings"], report["device"]
    table = [("", "measured", "operations allow"), *headline_rows(report)]
    made = (
        f"`{settings['command']}`, budget {settings['budget']:g}, {report['prefill'][-1]['visual_tokens']:,} visual "
        f"tokens, medians of {settings['rounds']}, {device['device']}, {device['date']}."
    )
    return f"{markdown_table(table)}\n\n{made}\n"


def between_marks(readme: str, name: str, block: str) -> str:
    """A text with one block between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin = f"<!-- {name}: begin. Filled by scripts/fill_readme.py; do not edit by hand. -->\n"
    end = f"<!-- {name}: end -->"
    before, _, rest = readme.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{README.name} lacks the marks {begin.strip()} and {end}; put them back")
    return f"{before}{begin}{block}{end}{after}"


@one_line_errors("fill_readme")
def main(argv: list[str]) -> None:
    """Fills it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    README.write_text(filled(README.read_text()))
    print(f"{README.name} shows " + ", ".join(str(path.relative_to(ROOT)) for path in (REPORT, STUDY, SPEED)))


if __name__ == "__main__":
    main(sys.argv[1:])
