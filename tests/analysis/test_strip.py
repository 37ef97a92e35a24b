"""Which frames a strip shows, and what it says of the others."""

from __future__ import annotations

from hybridprune_megatron.analysis.strip import chosen_frames, shown_words


def test_frames_that_keep_something_are_shown() -> None:
    left = [0] * 64
    left[7], left[20], left[63] = 3, 1, 9
    frames = chosen_frames(left, needed=range(30, 40))
    assert len(frames) == 12
    assert frames == sorted(set(frames))
    assert {7, 20, 63} <= set(frames)
    # Half of the columns are for what the answer needs, its first and last frame among them.
    assert len([frame for frame in frames if 30 <= frame < 40]) == 6
    assert {30, 39} <= set(frames)


def test_frames_that_keep_most_come_first_and_two_columns_are_for_others() -> None:
    left = list(range(40))
    frames = chosen_frames(left, needed=())
    assert set(range(30, 40)) <= set(frames)
    assert len(frames) == 12
    assert 0 in frames


def test_a_short_clip_is_shown_whole() -> None:
    assert chosen_frames([0, 2, 0], needed=(1,)) == [0, 1, 2]
    assert shown_words([0, 1, 2], [0, 2, 0]) == "frame"


def test_the_axis_says_how_much_is_shown() -> None:
    assert shown_words([1, 2], [1, 2, 1, 0]) == "frame; 2 of 4, with 75% of what is left at the end"
    assert shown_words([1], [0, 0]) == "frame; 1 of 2, with 0% of what is left at the end"
