"""The tables of a report."""

from __future__ import annotations

from hybridprune_megatron.evaluation.report import text_table
from studies.demo.report import markdown_table, summary_rows

REPORT = {
    "steps": 100,
    "budget": 0.25,
    "held_out_samples": 256,
    "mean_retention": 0.2503,
    "loss_first": 1.5,
    "loss_last": 0.25,
    "accuracy": {
        "chance": 0.1817,
        "full_before": 0.9,
        "reduced_before": 0.3,
        "reduced_after": 0.75,
        "full_after": 0.85,
    },
    "prefill_seconds": {"full": 2.0, "reduced": 1.0, "vision": 0.5},
    "timing": {"num_samples": 8, "threads": 2},
    "export_max_abs_logit_diff": 3.1e-6,
}


def test_the_summary_shows_every_figure_in_its_column():
    rows = {row[0]: row[1:] for row in summary_rows(REPORT)}
    assert rows[""] == ("before", "after", "")
    assert rows["accuracy, budget 0.25"][:2] == ("30.0 %", "75.0 %")
    assert "256 held-out questions, chance 18.2 %" in rows["accuracy, budget 0.25"]
    assert rows["accuracy, nothing dropped"][:2] == ("90.0 %", "85.0 %")
    assert rows["loss per answer token"][:2] == ("1.500", "0.250")
    assert rows["mean retention, measured"][1] == "0.2503"
    assert rows["export, largest logit difference"][1] == "3.1e-06"


def test_tables_are_aligned():
    rows = [("", "a", "note"), ("long name", "12.5", "x"), ("b", "7", "")]
    assert text_table(rows).splitlines() == ["              a  note", "long name  12.5  x", "b             7"]
    assert markdown_table(rows).splitlines()[:2] == ["|  | a | note |", "| --- | --- | --- |"]
