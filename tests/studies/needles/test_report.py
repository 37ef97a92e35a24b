"""The page: cells, differences and empty places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.needles.cells import METHODS, OURS, Unit
from studies.needles.plots import plot_study
from studies.needles.report import (
    budget_table,
    headline_table,
    kind_table,
    random_budget_table,
    seen_from_above,
    timing_key,
    write_report,
)


def row(stage: str, method: str, correct: str, budget: float = 0.25, seed: int = 0) -> dict[str, Any]:
    share = correct.count("1") / len(correct)
    kinds = {"what": share, "when": 0.5}
    key = Unit(stage, method, seed, (budget,)).key(budget)
    return {"key": key, "stage": stage, "method": method, "budget": budget, "seed": seed, "accuracy": share,
            "by_kind": kinds, "correct": correct}  # fmt: skip


ROWS = [
    row("before", "none", "1" * 90 + "0" * 10, budget=1.0),
    row("before", OURS, "1" * 50 + "0" * 50),
    row("after_fixed", "none", "1" * 92 + "0" * 8, budget=1.0),
    row("after", OURS, "1" * 80 + "0" * 20),
    row("after", OURS, "1" * 90 + "0" * 10, seed=1),
    row("after", "random", "1" * 40 + "0" * 60),
    row("after_fixed", OURS, "1" * 84 + "0" * 16),
    row("after_fixed", "utrc", "1" * 80 + "0" * 20),
    row("before", OURS, "1" * 70 + "0" * 30, budget=0.5),
]
TIMINGS = {timing_key(OURS, 0.25): {"full_seconds": 3.0, "reduced_seconds": 1.0}}


def line(table: list[tuple[str, ...]], label: str) -> tuple[str, ...]:
    (found,) = [each for each in table if each[0] == label]
    return found


def test_headline_shows_intervals_seeds_differences_and_speed() -> None:
    table = headline_table(ROWS, TIMINGS)
    ours = line(table, METHODS[0].label)
    assert ours[1] == "50.0 % (40-60)"
    assert ours[2].startswith("84.0 % (")
    assert ours[3].startswith("85.0 % (")
    assert ours[3].endswith("[2]")
    # Against every token finetuned alike, not against the base; at this budget where measured.
    assert ours[4].startswith("-8.0 (") or ours[4].startswith("**-8.0 (")
    assert ours[6] == "3.00"
    # Ours minus random, both at random budgets: 45 points, beyond the interval, so bold.
    assert line(table, "random")[5].startswith("**+45.0 (")
    # Ours minus UTRC, both at this budget.
    assert line(table, "UTRC (output norm, merging)")[5].startswith("**+4.0 (")
    assert line(table, "FastV")[1:] == ("", "", "", "", "", "")


def test_other_tables() -> None:
    assert line(budget_table(ROWS, TIMINGS, "before"), METHODS[0].label)[1:4] == (
        "70.0 % (61-79)",
        "",
        "50.0 % (40-60) (3.00 x)",
    )
    assert line(kind_table(ROWS, "after"), METHODS[0].label) == (METHODS[0].label, "85.0 %", "50.0 %")
    assert random_budget_table(ROWS)[2][1].startswith("85.0 %")


def test_links_of_the_findings_lead_through_their_folder() -> None:
    text = "![Kept](analysis/kept.png), [speed](../speed.md#cpu), [one](https://a.b/c), [below](#budgets)"
    page = "![Kept](study/analysis/kept.png), [speed](speed.md#cpu), [one](https://a.b/c), [below](#budgets)"
    assert seen_from_above(text, "study") == page


def test_page_and_figure_are_written(tmp_path: Path) -> None:
    plot_study(tmp_path / "study" / "accuracy.png", ROWS, chance=0.2)
    write_report(tmp_path / "study.md", ROWS, TIMINGS, "Setting.", "## Findings\n\nNone yet.\n", "study/accuracy.png")
    page = (tmp_path / "study.md").read_text()
    assert "## Budget 0.25, 100 held-out questions" in page
    assert "## Findings" in page
    assert "![Accuracy over budget](study/accuracy.png)" in page
    assert (tmp_path / "study" / "accuracy.png").stat().st_size > 10_000
