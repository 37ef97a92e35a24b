"""Crowded clips say what is where, oracles keep what they say, and the control replays another question's choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridprune_megatron.data.batch import EncodedSample, no_pixels
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.settings import Select
from studies.needles import question
from studies.needles.asked import Asked
from studies.needles.bench import Needle
from studies.needles.crowded import FRAMES, KINDS, SIDE, CrowdedPlan, plan_samples, tokens
from studies.needles.measure import Replayed, asks, replay
from studies.needles.needles import COLOURS, MOMENTS
from studies.needles.oracles import GivenFront, neighbours, oracle_scores, other_needles
from studies.needles.retrieval import auc, candidates


@pytest.fixture(scope="module")
def plans() -> list[CrowdedPlan]:
    return plan_samples(60, seed=3, split="validation")


def row_of(plan: CrowdedPlan) -> Asked:
    """The row of a plan, without pixels."""
    spans = [Span(TokenKind.TEXT, 2)]
    for frame in range(FRAMES):
        spans += [Span(TokenKind.FRAME, SIDE * SIDE, 0, frame), Span(TokenKind.TEXT, 1)]
    layout = SampleLayout((*spans, Span(TokenKind.QUESTION, 3)))
    ids = torch.zeros(layout.num_tokens, dtype=torch.long)
    return Asked(EncodedSample(plan.key, ids, ids, layout, no_pixels()), plan.meta())


def test_answers_are_true_of_the_plan(plans: list[CrowdedPlan]) -> None:
    for plan in plans:
        by_colour = {needle.colour: needle for needle in plan.needles}
        assert set(by_colour) == set(COLOURS)
        for turn in (plan.turn, *plan.others):
            words = turn.question.rstrip("?").replace(",", "").split()
            named = [by_colour[word] for word in words if word in by_colour]
            if turn.kind == "order":
                assert min(named, key=lambda needle: needle.first_frame).colour == turn.answer
                # Which is first is not in doubt.
                assert len({needle.moment for needle in named}) == 2
            else:
                (needle,) = named
                assert turn.answer == (needle.place if turn.kind == "where" else needle.moment)
        asked = {word for word in plan.turn.question.replace(",", "").rstrip("?").split() if word in by_colour}
        assert all(not asked & set(other.question.replace(",", "").split()) for other in plan.others)
        assert len(plan.others) == 3


def test_kinds_and_answers_are_balanced(plans: list[CrowdedPlan]) -> None:
    for kind, answers in KINDS.items():
        given = [plan.turn.answer for plan in plans if plan.turn.kind == kind]
        assert len(given) == 20
        counts = [given.count(answer) for answer in answers]
        assert max(counts) - min(counts) <= 1


def test_needles_cover_more_than_a_budget_of_a_quarter(plans: list[CrowdedPlan]) -> None:
    for plan in plans:
        assert 0.25 < plan.coverage() < 0.4
        covered = [token for needle in plan.needles for token in tokens(needle)]
        # No two share a token, so what covers one needle is not another's evidence.
        assert len(set(covered)) == len(covered)
        assert all(MOMENTS[frame // (FRAMES // 4)] == n.moment for n in plan.needles for frame, _ in tokens(n))
        assert len(plan.meta()["evidence"]) < 0.2 * FRAMES * SIDE * SIDE


def test_tokens_are_those_of_the_quadrant() -> None:
    needle = Needle("red", "circle", "1", "bottom-right", "start", 4, 2)
    assert tokens(needle) == [(4, 10), (4, 11), (4, 14), (4, 15), (5, 10), (5, 11), (5, 14), (5, 15)]
    assert tokens(replace(needle, place="top-left", num_frames=1)) == [(4, 0), (4, 1), (4, 4), (4, 5)]


def test_oracles_keep_what_they_say(plans: list[CrowdedPlan]) -> None:
    for plan in plans[:6]:
        row = row_of(plan)
        quarter = row.num_visual // 4
        evidence = set(row.indices(row.meta["evidence"]).tolist())

        def kept(case: str, count: int = quarter, row: Asked = row) -> set[int]:
            return set(torch.topk(oracle_scores(row, case), count).indices.tolist())

        assert evidence <= kept("evidence")
        assert evidence < set(neighbours(row, row.meta["evidence"]).tolist()) <= kept("evidence_and_neighbours")
        assert not evidence & kept("not_asked")
        needles = set(row.indices([token for each in row.meta["needles"] for token in each["tokens"]]).tolist())
        assert kept("not_asked", len(evidence)) <= needles - evidence
        assert torch.equal(oracle_scores(row, "not_asked"), oracle_scores(row, "not_asked"))
        assert len(other_needles(row, len(evidence), torch.Generator().manual_seed(1))) == len(evidence)


def test_a_given_front_ranks_as_given(plans: list[CrowdedPlan]) -> None:
    row = row_of(plans[0])
    layout = TokenLayout.from_samples([row.sample.layout])
    ranking = GivenFront(scores=oracle_scores(row, "evidence")).rank(
        torch.zeros(row.num_visual, 1), None, layout, [512]
    )
    chosen = select(ranking.scores, layout, (512,)).layout
    left = {tuple(pair) for pair in torch.stack([chosen.visual_frame, chosen.visual_patch], 1).tolist()}
    assert {tuple(token) for token in row.meta["evidence"]} <= left


def test_a_replay_keeps_what_the_other_pass_kept(plans: list[CrowdedPlan]) -> None:
    layout = TokenLayout.from_samples([row_of(plans[0]).sample.layout])
    reduction = Reduction(QueryScorer(), (1.0, 0.5, 0.5, 0.1), Select(frame_share=0.3))
    assert asks(reduction)
    assert not asks(replace(reduction, retention=(0.25,) * 4))
    trace, generator = [layout], torch.Generator().manual_seed(0)
    for counts in ReductionPass.of(reduction, layout).counts[1:]:
        now = trace[-1]
        scores = torch.rand(now.visual_counts[0], generator=generator)
        trace.append(select(scores, now, counts).layout if counts != now.visual_counts else now)
    again = replay(reduction, trace)
    assert isinstance(again.score, Replayed)
    now = layout
    for layer, counts in enumerate(ReductionPass.of(again, layout).counts[1:]):
        scores = again.score.score(None, now, layer)
        now = select(scores, now, counts).layout if counts != now.visual_counts else now
        assert torch.equal(now.origin, trace[layer + 1].origin)


def test_pairs_are_counted_right() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert auc(scores, torch.tensor([0]), torch.tensor([1, 2, 3])) == 1.0
    assert auc(scores, torch.tensor([1]), torch.tensor([0, 2])) == 0.0
    assert auc(scores, torch.tensor([1]), torch.tensor([3])) == 0.5


def test_a_layer_that_looks_at_the_named_row_is_found_by_it() -> None:
    read = torch.zeros(3, 8, 2)
    read[1, 5] = 1.0
    ranked = candidates("attention", read, named=[1])
    assert int(ranked["row of the colour"].argmax()) == 5
    assert candidates("attention", read, named=[0])["row of the colour"].max() == 0
    # Spread over the rows it is still there, in the mean a third of it.
    assert float(ranked["default"].max()) == pytest.approx(1 / 3)


def test_the_table_pairs_and_the_file_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"weights": "w", "data": "d", "clips": 4}
    common = {"kl": [0.0] * 4, "kinds": ["when", "where"] * 2, "retention": 0.25, **facts}
    names = [question.FULL, *question.ORACLES, "reduction=query"]
    marks = ["1111", "1111", "1111", "1000", "1100"]
    rows = [{"reduction": n, "correct": m, "correct_by_another": "", **common} for n, m in zip(names, marks)]
    rows[-1]["correct_by_another"] = "1000"
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(question, "measure_all", lambda *arguments: pytest.fail("measured again"))
    arguments = ["--weights", "w", "--data", "d", "--clips", "4", "--out", str(out)]
    question.main([*arguments, "reduction=query"])
    printed = capsys.readouterr().out
    assert "| `reduction=query` | 50.0 % (0-100) | 50 % | 50 % | 25.0 % | +25.0" in printed
    assert "+75.0" in printed
    assert "can tell" in printed
    rows[3]["correct"] = "1111"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="1"):
        question.main([*arguments, "reduction=query"])
    assert "can NOT tell" in capsys.readouterr().out
    assert np.isclose(question.difference([rows[0]], [rows[4]]).mean, 0.5)
