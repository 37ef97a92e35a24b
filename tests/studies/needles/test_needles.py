"""Needles: balanced plans, visible pixels, disjoint backgrounds, reproducible bytes."""

from collections import Counter

import numpy as np
import pytest
import torch

import studies.needles.needles as needles_module
from hybridprune_megatron.data.video import FrameSampling, decode_video
from studies.needles.needles import (
    CHOICES,
    COLOURS,
    KINDS,
    NeedleTask,
    background_frames,
    draw_needle,
    load_backgrounds,
    moment_frames,
    plan_samples,
    render_sample,
)


def test_only_the_chosen_kinds_are_asked() -> None:
    plans = plan_samples(NeedleTask(ask=("place", "colour")), 10, 0, "train")
    assert Counter(kind for plan in plans for kind in plan.kinds) == {"place": 5, "colour": 5}
    with pytest.raises(ValueError, match="--kinds size: one or more of colour, shape"):
        NeedleTask(ask=("size",))
    with pytest.raises(ValueError, match="stills have no moment"):
        NeedleTask(frames=1, ask=("moment",))


@pytest.mark.parametrize("needles", [1, 2])
@pytest.mark.parametrize("questions", [1, 4])
def test_kinds_and_answers_are_balanced(needles: int, questions: int) -> None:
    plans = plan_samples(NeedleTask(needles=needles, questions_per_video=questions), 400, 0, "train")
    kinds = Counter(kind for plan in plans for kind in plan.kinds)
    # With several needles a kind that names the needle cannot be asked, which disturbs the deck a little.
    assert max(kinds.values()) - min(kinds.values()) <= (1 if needles == 1 else 3)
    for kind, choices in CHOICES.items():
        answers = Counter(plan.needles[0][kind] for plan in plans if kind in plan.kinds)
        assert set(answers) == set(choices)
        assert max(answers.values()) - min(answers.values()) <= 1


def test_plans_depend_on_seed_and_split_only() -> None:
    task = NeedleTask()
    assert plan_samples(task, 30, 1, "train") == plan_samples(task, 30, 1, "train")
    assert plan_samples(task, 30, 1, "train")[:10] == plan_samples(task, 10, 1, "train")
    for other in (plan_samples(task, 30, 2, "train"), plan_samples(task, 30, 1, "validation")):
        assert [plan.needles for plan in other] != [plan.needles for plan in plan_samples(task, 30, 1, "train")]


def test_conversation_asks_every_kind_once_and_shows_the_video_first() -> None:
    for plan in plan_samples(NeedleTask(questions_per_video=5), 20, 0, "train"):
        messages = plan.conversation()
        assert sorted(plan.kinds) == sorted(KINDS)
        assert len(messages) == 10
        assert [message["content"].count("<video>") for message in messages] == [1] + [0] * 9
        assert [message["content"] for message in messages[1::2]] == [plan.needles[0][kind] for kind in plan.kinds]
        assert plan.meta()["answer"] in plan.meta()["choices"]


def test_several_needles_differ_and_the_question_names_one() -> None:
    for plan in plan_samples(NeedleTask(needles=3, questions_per_video=4), 40, 0, "train"):
        for kind in KINDS:
            assert len({needle[kind] for needle in plan.needles}) == 3
        assert plan.named_by is not None
        assert plan.named_by not in plan.kinds
        name = plan.needles[0][plan.named_by]
        assert all(name in message["content"] for message in plan.conversation()[0::2])


def test_stills_show_the_needle_and_never_ask_for_the_moment() -> None:
    task = NeedleTask(frames=1, questions_per_video=4)
    plans = plan_samples(task, 10, 0, "train")
    assert all("moment" not in plan.kinds for plan in plans)
    for plan in plans[:3]:
        still = decode_video(render_sample(plan, task, False), FrameSampling(), 128).frames.float()
        background = background_frames(np.random.default_rng(plan.seed), task.frames, task.size, False)
        difference = (still - torch.from_numpy(background.copy()).permute(0, 3, 1, 2)).abs().mean(1)
        assert len(still) == 1
        assert difference.max() > 60


def test_needle_is_where_and_when_the_plan_says() -> None:
    task = NeedleTask(frames=16, fps=2)
    sampling = FrameSampling("uniform", num_frames=16)
    for plan in plan_samples(task, 12, 0, "train"):
        with_needle = decode_video(render_sample(plan, task, False), sampling, 128).frames.float()
        background = background_frames(np.random.default_rng(plan.seed), task.frames, task.size, False)
        difference = (with_needle - torch.from_numpy(background.copy()).permute(0, 3, 1, 2)).abs().mean(1)
        # [frames, vertical half, horizontal half]
        quadrants = difference.unflatten(1, (2, 64)).unflatten(3, (2, 64)).mean(dim=(2, 4))
        needle = plan.needles[0]
        first, stop = moment_frames(needle["moment"], 16)
        assert plan.meta()["evidence_frames"] == [[first, stop]]
        assert plan.meta()["needles"] == [{**needle, "first_frame": first, "num_frames": stop - first}]
        row, column = needle["place"].startswith("bottom"), needle["place"].endswith("right")
        inside = quadrants[first:stop, int(row), int(column)]
        assert stop - first == 4
        assert inside.min() > 12
        quadrants[first:stop, int(row), int(column)] = 0
        assert quadrants.max() < 8


def test_colours_and_shapes_and_digits_look_different() -> None:
    pictures = {
        (shape, colour, digit): draw_needle(shape, colour, digit, 44).astype(int)
        for shape in CHOICES["shape"]
        for colour in ("red", "black", "white")
        for digit in ("1", "8")
    }
    keys = list(pictures)
    for index, key in enumerate(keys):
        for other in keys[:index]:
            assert np.abs(pictures[key] - pictures[other]).mean() > 2, (key, other)
    values = np.array(list(COLOURS.values()))
    apart = np.abs(values[:, None] - values[None]).max(-1) + 255 * np.eye(len(values), dtype=int)
    assert apart.min() > 150


def test_rendering_repeats_to_the_byte() -> None:
    task = NeedleTask(frames=8, fps=1)
    plan = plan_samples(task, 3, 5, "train")[2]
    assert render_sample(plan, task, False) == render_sample(plan, task, False)
    assert render_sample(plan, task, False) != render_sample(plan, task, True)


def test_held_out_backgrounds_are_other_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    # Frames that carry their index: 100 frames, of which the first 75 are for training.
    numbered = np.broadcast_to(np.arange(100)[:, None, None, None], (100, 80, 90, 3)).astype(np.uint8)
    monkeypatch.setattr(needles_module, "load_backgrounds", lambda size: (numbered,))
    task = NeedleTask(frames=32, size=64)
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for held_out, indices in seen.items():
        for seed in range(60):
            crop = background_frames(np.random.default_rng(seed), task.frames, task.size, held_out)
            assert crop.shape == (32, 64, 64, 3)
            walk = crop[:, 0, 0, 0].astype(int)
            assert np.abs(np.diff(walk)).max() <= 3
            indices.update(walk)
    assert seen[False] == set(range(75))
    assert seen[True] == set(range(75, 100))


def test_backgrounds_are_the_four_real_clips() -> None:
    clips = load_backgrounds(64)
    assert [len(clip) for clip in clips] == [132, 250, 120, 120]
    assert all(min(clip.shape[1:3]) == 80 for clip in clips)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"frames": 3}, "--frames 3"),
        ({"frames": 1, "questions_per_video": 5}, "--questions-per-video 5"),
        ({"size": 63}, "--size 63"),
        ({"needles": 5}, "--needles 5"),
        ({"questions_per_video": 6}, "--questions-per-video 6"),
        ({"questions_per_video": 5, "needles": 2}, "--questions-per-video 5"),
    ],
)
def test_task_is_checked(fields: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        NeedleTask(**fields)
