"""The study's benchmark: up to four short needles and a nearly invisible ghost in a long clip of real video.

A question names the needle it is about, so that which tokens matter depends on the question. Kinds of questions stress
different things: ``what`` (by moment or place), ``where``, ``when``, ``recall`` (one of these three where there are
several needles), ``order`` of two needles, ``count`` of all of them, and ``ghost``, the place of a needle that is
hardly there. Planning and rendering are separate; answers come
from shuffled decks, as in ``needles``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from studies.needles.needles import (
    COLOURS,
    DIGITS,
    MOMENTS,
    PLACES,
    SHAPES,
    Deck,
    background_frames,
    draw_on,
    encode_clip,
    moment_frames,
    placed_needle,
)

MAX_NEEDLES = len(MOMENTS)
COUNTS = tuple(str(number) for number in range(1, MAX_NEEDLES + 1))
#: Answers of every kind of question; chance is one over their number, but for ``order``, which names two colours.
CHOICES: dict[str, tuple[str, ...]] = {
    "what": tuple(COLOURS),
    "where": PLACES,
    "when": MOMENTS,
    "order": tuple(COLOURS),
    "count": COUNTS,
    "ghost": PLACES,
}
KINDS = tuple(CHOICES)
#: Kinds that a model which sees every token should hardly miss where there is one needle.
EASY_KINDS = ("what", "where", "when")
RECALL = "recall"


@dataclass(frozen=True)
class BenchTask:
    """How the samples of a benchmark look.

    Attributes:
        frames: frames of a clip, at least 4, one per quarter.
        seconds: length of a clip; frames are spread evenly over it.
        size: side of a clip in pixels.
        visible_frames: fewest and most frames in which a needle is seen, all within its quarter of the clip.
        ghost_opacity: of the ghost, between 0 (nothing to see) and 1 (a needle like the others).
        questions_per_video: question turns of a sample.
        recall_apart: ask what, where and when about clips with one needle, and about clips with several as a kind of
            its own, ``recall``; for measuring. Otherwise any clip is asked anything.
    """

    frames: int = 128
    seconds: int = 64
    size: int = 128
    visible_frames: tuple[int, int] = (4, 8)
    ghost_opacity: float = 0.3
    questions_per_video: int = 1
    recall_apart: bool = False

    def __post_init__(self) -> None:
        if self.frames < len(MOMENTS):
            raise ValueError(f"--frames {self.frames}: at least {len(MOMENTS)}, one per quarter")
        if self.seconds < 1:
            raise ValueError(f"--seconds {self.seconds}: at least 1")
        if self.size < 64 or self.size % 2:
            raise ValueError(f"--size {self.size}: an even number of pixels from 64")
        fewest, most = self.visible_frames
        if not 1 <= fewest <= most <= self.frames // len(MOMENTS):
            quarter = self.frames // len(MOMENTS)
            raise ValueError(f"--visible-frames {fewest} {most}: rising, from 1 to {quarter}, a quarter of --frames")
        if not 0 < self.ghost_opacity <= 1:
            raise ValueError(f"--ghost-opacity {self.ghost_opacity}: above 0 and at most 1")
        if not 1 <= self.questions_per_video <= len(KINDS) * MAX_NEEDLES:
            raise ValueError(f"--questions-per-video {self.questions_per_video}: 1 to {len(KINDS) * MAX_NEEDLES}")

    def plan(self, count: int, seed: int, split: str) -> list[BenchPlan]:
        """Plans samples with balanced kinds, and balanced answers of the first question of every kind.

        Args:
            count: number of samples.
            seed: of the data set.
            split: name of the split; it enters the keys and the seeds.
        """
        split_seed = [seed, *split.encode("ascii")]
        rng = np.random.default_rng(split_seed)
        kinds = Deck((*KINDS, RECALL) if self.recall_apart else KINDS, rng)
        decks, recalled = {kind: Deck(values, rng) for kind, values in CHOICES.items()}, Deck(EASY_KINDS, rng)
        first_named = Deck(("first", "second"), rng)
        plans = []
        for index in range(count):
            drawn = kinds.take()
            kind = recalled.take() if drawn == RECALL else drawn
            answer = decks[kind].take()
            needles, ghost = _draw_needles(rng, self, kind, answer, *self._needle_range(drawn))
            first = replace(_first_turn(rng, kind, needles, ghost, first_named), kind=drawn)
            turns = (first, *_more_turns(rng, needles, ghost, first, self.questions_per_video - 1))
            plans.append(BenchPlan(self, f"{split}-{index:06d}", (*split_seed, index), needles, ghost, turns))
        return plans

    def _needle_range(self, kind: str) -> tuple[int, int]:
        """Fewest and most needles of a clip whose first question is of a kind; ``count`` has its answer's number."""
        several = kind in ("order", RECALL)
        return 2 if several else 1, 1 if self.recall_apart and kind in EASY_KINDS else MAX_NEEDLES


@dataclass(frozen=True)
class Needle:
    """One shape on the clip.

    Attributes:
        colour, shape, digit, place, moment: what a question may ask for or name it by.
        first_frame: where it appears.
        num_frames: how long it stays.
    """

    colour: str
    shape: str
    digit: str
    place: str
    moment: str
    first_frame: int
    num_frames: int

    @property
    def span(self) -> tuple[int, int]:
        """Its first frame, and the one after its last."""
        return self.first_frame, self.first_frame + self.num_frames

    def draw(self, rng: np.random.Generator, frames: np.ndarray, size: int, opacity: float = 1.0) -> None:
        """Draws it on a clip, where and when it is seen.

        Args:
            rng: decides its size, and where in its quadrant it is.
            frames: uint8 [F, size, size, 3].
            opacity: 0 to 1.
        """
        picture, alpha, x, y = placed_needle(rng, self.shape, self.colour, self.digit, self.place, size)
        draw_on(frames[slice(*self.span)], picture, alpha * opacity, x, y)


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        kind: of the question.
        question: its text.
        answer: the right one.
        frames: first frame and the frame after the last of everything the answer needs.
        choices: what a guess would choose from.
    """

    kind: str
    question: str
    answer: str
    frames: tuple[tuple[int, int], ...]
    choices: tuple[str, ...]


@dataclass(frozen=True)
class BenchPlan:
    """One sample before it is rendered.

    Attributes:
        task: how it looks.
        key: sample key.
        seed: of everything random in its pixels.
        needles: 1 to 4 needles of different colours, places and moments.
        ghost: the nearly invisible one; it does not count as a needle.
        turns: questions in order.
    """

    task: BenchTask
    key: str
    seed: tuple[int, ...]
    needles: tuple[Needle, ...]
    ghost: Needle
    turns: tuple[Turn, ...]

    @property
    def answers(self) -> dict[str, str]:
        """Kind and answer of the first question, which is the one that an evaluation asks."""
        return {self.turns[0].kind: self.turns[0].answer}

    def conversation(self) -> list[dict[str, str]]:
        """Messages; the video stands at the start of the first question."""
        messages = []
        for number, turn in enumerate(self.turns):
            video = "" if number else "<video>\n"
            messages.append({"role": "user", "content": video + turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def meta(self) -> dict[str, Any]:
        """Kind, answer, choices and evidence of the first question for an evaluation, the needles for an analysis."""
        first = self.turns[0]
        return {
            "kind": first.kind,
            "answer": first.answer,
            "choices": list(first.choices),
            "kinds": [turn.kind for turn in self.turns],
            "evidence_frames": [list(span) for span in first.frames],
            "needles": [asdict(needle) for needle in self.needles],
        }

    def render(self, held_out: bool) -> bytes:
        """The clip as MP4 bytes (H.264): a window of a real clip with the needles and the ghost drawn on it."""
        task = self.task
        rng = np.random.default_rng(self.seed)
        frames = background_frames(rng, task.frames, task.size, held_out)
        for needle in (*self.needles, self.ghost):
            needle.draw(rng, frames, task.size, task.ghost_opacity if needle is self.ghost else 1.0)
        return encode_clip(frames, Fraction(task.frames, task.seconds))


def _draw_needles(
    rng: np.random.Generator, task: BenchTask, kind: str, answer: str, fewest: int, most: int
) -> tuple[tuple[Needle, ...], Needle]:
    """Needles and ghost; the first needle (for ``order`` the earlier of the first two) has the answer."""
    number = int(answer) if kind == "count" else int(rng.integers(fewest, most + 1))
    colours, places, moments = (_permuted(rng, values) for values in (tuple(COLOURS), PLACES, MOMENTS))
    asked = {"what": colours, "order": colours, "where": places, "when": moments}.get(kind)
    if asked is not None:
        asked.insert(0, asked.pop(asked.index(answer)))
    if kind == "order":
        moments[:2] = sorted(moments[:2], key=MOMENTS.index)
    needles = tuple(_needle(rng, task, colours[i], places[i], moments[i]) for i in range(number))
    ghost_place = answer if kind == "ghost" else str(rng.choice(PLACES))
    return needles, _needle(rng, task, str(rng.choice(tuple(COLOURS))), ghost_place, str(rng.choice(MOMENTS)))


def _needle(rng: np.random.Generator, task: BenchTask, colour: str, place: str, moment: str) -> Needle:
    begin, end = moment_frames(moment, task.frames)
    visible = int(rng.integers(task.visible_frames[0], task.visible_frames[1] + 1))
    first = int(rng.integers(begin, end - visible + 1))
    return Needle(colour, str(rng.choice(SHAPES)), str(rng.choice(DIGITS)), place, moment, first, visible)


def _permuted(rng: np.random.Generator, values: tuple[str, ...]) -> list[str]:
    return [str(value) for value in rng.permutation(values)]


def _first_turn(
    rng: np.random.Generator, kind: str, needles: tuple[Needle, ...], ghost: Needle, first_named: Deck
) -> Turn:
    if kind == "order":
        return order_turn(needles[0], needles[1], first_named.take() == "first")
    if kind == "what":
        return _what_turn(needles[0], by_moment=bool(rng.random() < 0.5))
    return _turn(kind, needles, needles[0], ghost)


def _more_turns(
    rng: np.random.Generator, needles: tuple[Needle, ...], ghost: Needle, first: Turn, number: int
) -> list[Turn]:
    """Other questions about the same clip in random order, each at most once."""
    turns = [_turn("count", needles, needles[0], ghost), _turn("ghost", needles, needles[0], ghost)]
    for needle in needles:
        turns += [_turn(kind, needles, needle, ghost) for kind in ("where", "when")]
        turns += [_what_turn(needle, by_moment) for by_moment in (True, False)]
    for index, one in enumerate(needles):
        for other in needles[index + 1 :]:
            early, late = sorted((one, other), key=lambda needle: needle.first_frame)
            turns.append(order_turn(early, late, bool(rng.random() < 0.5)))
    asked = {first.question}
    others = [turns[index] for index in rng.permutation(len(turns)) if turns[index].question not in asked]
    return others[:number]


def _turn(kind: str, needles: tuple[Needle, ...], needle: Needle, ghost: Needle) -> Turn:
    if kind == "where":
        return where_turn(needle)
    if kind == "when":
        return when_turn(needle)
    if kind == "count":
        spans = tuple(each.span for each in needles)
        return Turn(kind, "How many needles are shown?", str(len(needles)), spans, COUNTS)
    assert kind == "ghost", kind
    return Turn(kind, "Where is the ghost?", ghost.place, (ghost.span,), PLACES)


def _what_turn(needle: Needle, by_moment: bool) -> Turn:
    name = f"shown at {needle.moment}" if by_moment else f"at the {needle.place}"
    return Turn("what", f"What colour is the needle {name}?", needle.colour, (needle.span,), tuple(COLOURS))


def where_turn(needle: Needle) -> Turn:
    """Asks for the place of the needle of a colour."""
    return Turn("where", f"Where is the {needle.colour} needle?", needle.place, (needle.span,), PLACES)


def when_turn(needle: Needle) -> Turn:
    """Asks for the moment of the needle of a colour."""
    return Turn("when", f"When is the {needle.colour} needle shown?", needle.moment, (needle.span,), MOMENTS)


def order_turn(early: Needle, late: Needle, early_named_first: bool) -> Turn:
    """Asks which of two needles is shown first."""
    names = (early.colour, late.colour) if early_named_first else (late.colour, early.colour)
    question = f"Which is shown first, {names[0]} or {names[1]}?"
    return Turn("order", question, early.colour, (early.span, late.span), names)
