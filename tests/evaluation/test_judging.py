"""Figures of questions against sums by hand, intervals against a plain bootstrap, and which question is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from hybridprune_megatron.data.conversation import Conversation
from hybridprune_megatron.data.known import Known
from hybridprune_megatron.evaluation import intervals
from hybridprune_megatron.evaluation.asked import About, asked_turn, question_text
from hybridprune_megatron.evaluation.evaluation_page import plot_budgets, table_rows
from hybridprune_megatron.evaluation.intervals import bootstrap
from hybridprune_megatron.evaluation.judging import Outcome, figures

CHOICES = ("red", "blue")
COLOUR = About("a", "Which?", " red", (" red", "blue"), "colour")
OUTCOMES = [
    Outcome(COLOUR, "red", 0.5, 2, " red", (1.0, 0.5)),
    Outcome(About("b", "Which?", "blue", CHOICES, "colour"), "blue.", 3.0, 4, "blue", (1.0, 0.7)),
    Outcome(About("c", "Where?", "left", ("left", "right", "up"), "place"), "right", 2.0, 2, "right", None),
    Outcome(About("d", "Why?", "so"), "so", 0.1, 1, None, None),
]


def test_figures_are_sums_over_the_questions() -> None:
    found = figures(OUTCOMES)
    assert found.loss.mean == pytest.approx(5.6 / 9)
    assert found.exact.all.mean == 0.5
    assert {kind: each.mean for kind, each in found.exact.by_kind.items()} == {"colour": 0.5, "place": 0.0}
    assert found.choice is not None
    assert found.choice.all.mean == pytest.approx(2 / 3)
    assert found.choice.samples == 3
    assert {kind: each.mean for kind, each in found.choice.by_kind.items()} == {"colour": 1.0, "place": 0.0}
    assert found.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert found.retention.by_layer == pytest.approx((1.0, 0.6))
    assert found.samples == 4
    bare = figures(OUTCOMES[3:])
    assert (bare.choice, bare.chance, bare.exact.by_kind) == (None, None, {})
    assert bare.retention.mean == 1.0


def test_a_prediction_says_what_it_is_about() -> None:
    row = OUTCOMES[0].row(0.25)
    assert list(row)[:7] == ["key", "budget", "kind", "question", "answer", "prediction", "correct"]
    assert row["correct"] is row["choice_correct"] is True
    assert row["loss"] == 0.25
    assert OUTCOMES[1].row(1.0)["correct"] is False
    assert "choice" not in OUTCOMES[3].row(1.0)


def test_intervals_are_those_of_a_plain_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.random(37), rng.integers(1, 9, 37).astype(float)
    found = bootstrap(values, weights)
    drawn = rng.integers(0, 37, (4000, 37))
    means = values[drawn].sum(1) / weights[drawn].sum(1)
    assert found.mean == pytest.approx(values.sum() / weights.sum())
    assert [found.low, found.high] == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.05 * (found.high - found.low)
    )
    # The same whatever the memory, and one number has no spread.
    monkeypatch.setattr(intervals, "_BLOCK", 1000)
    assert bootstrap(values, weights) == found
    assert bootstrap(np.array([0.5])) == intervals.Interval(0.5, 0.5, 0.5)


TALK = Conversation(None, ("<video>\nOne?", "Two?", "Three?"), ("1", "2", "3"))


@pytest.mark.parametrize(
    ("conversation", "known", "question", "before", "said"),
    [
        (TALK, Known(), "Three?", ("1", "2"), "3"),
        (TALK, Known("3"), "Three?", ("1", "2"), "3"),
        (TALK, Known("C"), "Three?", ("1", "2"), "3"),
        # What the demo's data sets say of conversations with several questions: the answer of the first.
        (TALK, Known("1"), "One?", (), "1"),
        (TALK, Known("2"), "Two?", ("1",), "2"),
        (Conversation(None, ("One?", "Two?"), ("1",)), Known(), "Two?", ("1",), None),
        (Conversation("Be brief.", ("One?",), ()), Known("1"), "One?", (), None),
    ],
)
def test_the_question_that_is_asked(
    conversation: Conversation, known: Known, question: str, before: tuple[str, ...], said: str | None
) -> None:
    asked, own = asked_turn(conversation, known)
    assert (question_text(asked), asked.answers, own) == (question, before, said)
    assert len(asked.questions) == len(before) + 1
    assert asked.system == conversation.system


def test_table_and_picture_have_every_budget(tmp_path: Path) -> None:
    worse = [replace(each, prediction="what?", loss=2 * each.loss) for each in OUTCOMES]
    found = {"1": figures(OUTCOMES), "0.25": figures(worse)}
    budgets = {"1": 1.0, "0.25": 0.25}
    rows = table_rows(found, budgets)
    assert rows[0] == ("budget", "1", "0.25", "")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["exact match"] == ("50.0 %", "0.0 %", "4 questions")
    assert cells["multiple choice"] == ("66.7 %", "66.7 %", "likeliest of the choices of 3 questions, chance 44.4 %")
    assert cells["loss"][:2] == ("0.6222", "1.2444")
    assert cells["visual tokens kept"] == ("80.0 %", "80.0 %", "mean over layers")
    assert all(len(row) == 4 for row in rows)
    plain = table_rows({"full": figures(OUTCOMES[3:])}, {"full": 1.0})
    assert plain[0] == ("", "full", "")
    assert "multiple choice" not in [row[0] for row in plain]
    plot_budgets(tmp_path / "plot.png", found, budgets)
    plot_budgets(tmp_path / "bare.png", {name: figures(OUTCOMES[3:]) for name in found}, budgets)
    with av.open(str(tmp_path / "plot.png")) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="gray")
    assert picture.shape == (480, 1200)
    assert 0.02 < (picture < 200).mean() < 0.3
