"""The study's benchmark: answers are true of the pixels' plan, balanced, and named by something unique in the clip."""

from __future__ import annotations

import io
from collections import Counter

import av
import numpy as np
import pytest

from studies.base.make_bench_data import main as make_bench_data
from studies.needles.bench import (
    CHOICES,
    EASY_KINDS,
    KINDS,
    MOMENTS,
    BenchPlan,
    BenchTask,
    Needle,
    Turn,
)

TASK = BenchTask(frames=32, seconds=16, visible_frames=(2, 5), questions_per_video=12)


def the_needle(plan: BenchPlan, **attributes: str) -> Needle:
    """The only needle of a clip with these attributes."""
    (needle,) = [n for n in plan.needles if all(getattr(n, name) == value for name, value in attributes.items())]
    return needle


def expected_answer(plan: BenchPlan, turn: Turn) -> str:
    """Answers a question from the plan alone, reading its text."""
    words = turn.question.rstrip("?").split()
    if turn.kind == "count":
        return str(len(plan.needles))
    if turn.kind == "ghost":
        return plan.ghost.place
    if words[0] in ("Where", "When"):
        needle = the_needle(plan, colour=words[3])
        return needle.place if words[0] == "Where" else needle.moment
    if words[0] == "What":
        named = "moment" if words[-1] in MOMENTS else "place"
        return the_needle(plan, **{named: words[-1]}).colour
    assert turn.kind == "order"
    one, other = the_needle(plan, colour=words[4].rstrip(",")), the_needle(plan, colour=words[6])
    return min(one, other, key=lambda needle: needle.first_frame).colour


def test_every_answer_is_true_and_no_question_comes_twice() -> None:
    for plan in TASK.plan(200, seed=3, split="train"):
        questions = [turn.question for turn in plan.turns]
        assert len(set(questions)) == len(questions)
        for turn in plan.turns:
            assert turn.answer == expected_answer(plan, turn), (plan.key, turn)
            assert turn.answer in turn.choices


def test_recall_apart_from_what_where_and_when() -> None:
    task = BenchTask(frames=32, seconds=16, visible_frames=(2, 5), recall_apart=True)
    plans = task.plan(700, seed=6, split="validation")
    assert set(Counter(plan.turns[0].kind for plan in plans).values()) == {100}
    for plan in plans:
        (turn,) = plan.turns
        assert turn.answer == expected_answer(plan, turn)
        if turn.kind in EASY_KINDS:
            assert len(plan.needles) == 1
        elif turn.kind in ("recall", "order"):
            assert len(plan.needles) >= 2
    recalled = Counter(plan.turns[0].question.split()[0] for plan in plans if plan.turns[0].kind == "recall")
    assert max(recalled.values()) - min(recalled.values()) <= 1


def test_needles_differ_in_whatever_can_name_them_and_stay_in_their_quarter() -> None:
    for plan in TASK.plan(100, seed=4, split="train"):
        for attribute in ("colour", "place", "moment"):
            values = [getattr(needle, attribute) for needle in plan.needles]
            assert len(set(values)) == len(values)
        for needle in (*plan.needles, plan.ghost):
            assert 2 <= needle.num_frames <= 5
            first_quarter = needle.first_frame * 4 // TASK.frames
            last_quarter = (needle.first_frame + needle.num_frames - 1) * 4 // TASK.frames
            assert first_quarter == last_quarter == MOMENTS.index(needle.moment)


def test_meta_says_when_every_needle_and_what_the_answer_needs_is_shown() -> None:
    for plan in TASK.plan(60, seed=6, split="train"):
        meta = plan.meta()
        spans = {
            needle["colour"]: [needle["first_frame"], needle["first_frame"] + needle["num_frames"]]
            for needle in meta["needles"]
        }
        assert list(spans) == [needle.colour for needle in plan.needles]
        if meta["kind"] in ("what", "order"):
            assert spans[meta["answer"]] in meta["evidence_frames"]
        if meta["kind"] == "count":
            assert sorted(meta["evidence_frames"]) == sorted(spans.values())


def test_first_questions_and_their_answers_are_balanced() -> None:
    plans = TASK.plan(960, seed=5, split="validation")
    kinds = Counter(plan.turns[0].kind for plan in plans)
    assert set(kinds.values()) == {960 // len(KINDS)}
    for kind, choices in CHOICES.items():
        answers = Counter(plan.turns[0].answer for plan in plans if plan.turns[0].kind == kind)
        assert max(answers.values()) - min(answers.values()) <= 1, kind
        assert set(answers) == set(choices)
    first_named = [p.turns[0].choices[0] == p.turns[0].answer for p in plans if p.turns[0].kind == "order"]
    assert sum(first_named) == len(first_named) / 2


def test_needles_are_on_their_frames_only_and_the_ghost_is_faint() -> None:
    task = BenchTask(frames=16, seconds=8, size=64, visible_frames=(2, 2), ghost_opacity=0.2)
    (plan,) = task.plan(1, seed=8, split="train")
    bare = decode(BenchPlan(task, plan.key, plan.seed, (), plan.ghost, plan.turns).render(held_out=False))
    full = decode(plan.render(held_out=False))
    change = np.abs(full - bare).mean(axis=(1, 2, 3))
    for frame in range(task.frames):
        shown = any(needle.first_frame <= frame < needle.first_frame + 2 for needle in plan.needles)
        ghost = plan.ghost.first_frame <= frame < plan.ghost.first_frame + 2
        if shown:
            assert change[frame] > 3
        elif not ghost:
            # What is left are traces of the encoder.
            assert change[frame] < 2
    solid = BenchTask(frames=16, seconds=8, size=64, visible_frames=(2, 2), ghost_opacity=1.0)
    seen = decode(BenchPlan(solid, plan.key, plan.seed, (), plan.ghost, plan.turns).render(held_out=False))
    frame = plan.ghost.first_frame
    assert np.abs(seen[frame] - bare[frame]).mean() > 3


def decode(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.float32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--frames 3", "--frames 3: at least 4"),
        ("--visible-frames 4 80", "--visible-frames 4 80: rising, from 1 to 32"),
        ("--ghost-opacity 0", "--ghost-opacity 0.0: above 0"),
        ("--questions-per-video 99", "--questions-per-video 99: 1 to 24"),
    ],
)
def test_impossible_settings_end_with_one_line(flags: str, message: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_bench_data(["--out", str(tmp_path), *flags.split()])
    assert capsys.readouterr().err.startswith(f"hybridprune make_bench_data: {message}")
