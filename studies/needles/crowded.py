"""Clips in which more happens than a budget can hold: eight needles, of which a question is about one or two.

    python -m studies.needles.crowded --out runs/crowded/clips --samples 240 --seed 41
    python scripts/precompute_features.py experiment=bench model.init_checkpoint=assets/bench/base.safetensors \\
        --data runs/crowded/clips/validation --out runs/crowded/features

The study's own benchmark shows at most four needles, 2.3 % of its tokens, so whoever keeps what stands out keeps them
all. Here every colour is shown, each for some seconds in a quadrant of its own at its time, and together they cover a
third of the tokens. Everything else (backgrounds, needles, the words of the questions) is the benchmark's, so the same
base model answers. ``studies.needles.question`` measures who looks at the question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hybridprune_megatron.config.one_line import one_line_errors, whole
from studies.needles.bench import Needle, Turn, order_turn, when_turn, where_turn
from studies.needles.needle_shards import write_split
from studies.needles.needles import (
    COLOURS,
    DIGITS,
    MOMENTS,
    PLACES,
    SHAPES,
    Deck,
    background_frames,
    encode_clip,
    moment_frames,
)

FRAMES, SECONDS, SIZE = 128, 64, 128
#: Side of a frame in visual tokens; a quadrant is a quarter of them.
SIDE = 4
#: Fewest and most frames in which a needle is seen, of the 32 of its quarter of the clip.
VISIBLE = (16, 24)
KINDS: dict[str, tuple[str, ...]] = {"where": PLACES, "when": MOMENTS, "order": tuple(COLOURS)}
_OTHERS = 3


@dataclass(frozen=True)
class CrowdedPlan:
    """One sample before it is rendered.

    Attributes:
        key: sample key.
        seed: of everything random in its pixels.
        needles: one of every colour; no two share both place and moment.
        turn: the question.
        others: questions about none of its needles.
    """

    key: str
    seed: tuple[int, ...]
    needles: tuple[Needle, ...]
    turn: Turn
    others: tuple[Turn, ...]

    def conversation(self) -> list[dict[str, str]]:
        """Messages; the video stands before the question."""
        return [
            {"role": "user", "content": f"<video>\n{self.turn.question}"},
            {"role": "assistant", "content": self.turn.answer},
        ]

    def meta(self) -> dict[str, Any]:
        """What an evaluation and an oracle need to know; tokens are pairs of a frame and a token within it."""
        return {
            "kind": self.turn.kind,
            "answer": self.turn.answer,
            "choices": list(self.turn.choices),
            "tokens_per_frame": SIDE * SIDE,
            "evidence": [token for span in self.turn.frames for token in self._tokens_at(span)],
            "needles": [{**asdict(needle), "tokens": tokens(needle)} for needle in self.needles],
            "others": [{"kind": t.kind, "question": t.question, "answer": t.answer} for t in self.others],
        }

    def _tokens_at(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        (needle,) = [needle for needle in self.needles if needle.span == span]
        return tokens(needle)

    def coverage(self) -> float:
        """Share of the visual tokens in whose quadrant a needle is seen."""
        return sum(len(tokens(needle)) for needle in self.needles) / (FRAMES * SIDE * SIDE)

    def render(self, held_out: bool) -> bytes:
        """The clip as MP4 bytes (H.264)."""
        rng = np.random.default_rng(self.seed)
        frames = background_frames(rng, FRAMES, SIZE, held_out)
        for needle in self.needles:
            needle.draw(rng, frames, SIZE)
        return encode_clip(frames, Fraction(FRAMES, SECONDS))


def tokens(needle: Needle) -> list[tuple[int, int]]:
    """Frame and number within it (row by row) of the tokens of a needle's quadrant while it is seen."""
    half = SIDE // 2
    top, left = half * needle.place.startswith("bottom"), half * needle.place.endswith("right")
    places = [(top + y) * SIDE + left + x for y in range(half) for x in range(half)]
    return [(frame, place) for frame in range(*needle.span) for place in places]


def plan_samples(count: int, seed: int, split: str) -> list[CrowdedPlan]:
    """Plans samples with balanced kinds and balanced answers of every kind.

    Args:
        count: number of samples.
        seed: of the data set.
        split: name of the split; it enters the keys and the seeds.
    """
    seeds = [seed, *split.encode("ascii")]
    rng = np.random.default_rng(seeds)
    kinds, decks = Deck(tuple(KINDS), rng), {kind: Deck(answers, rng) for kind, answers in KINDS.items()}
    first_named = Deck(("earlier", "later"), rng)
    plans = []
    for index in range(count):
        kind = kinds.take()
        answer = decks[kind].take()
        turn = None
        while turn is None:
            needles = _draw_needles(rng)
            turn = _ask(kind, answer, needles, first_named.take() == "earlier", rng)
        asked = set(turn.frames)
        free = tuple(needle for needle in needles if needle.span not in asked)
        others = [_ask("where", needle.place, (needle,), True, rng) for needle in free]
        chosen = [others[number] for number in rng.permutation(len(others))[:_OTHERS]]
        key = f"{split}-{index:06d}"
        plans.append(CrowdedPlan(key, (*seeds, index), needles, turn, tuple(each for each in chosen if each)))
    return plans


def _draw_needles(rng: np.random.Generator) -> tuple[Needle, ...]:
    """A needle of every colour. No two begin in the same frame, so which is first is never in doubt."""
    while True:
        pairs = list(product(PLACES, MOMENTS))
        drawn = [pairs[number] for number in rng.permutation(len(pairs))[: len(COLOURS)]]
        needles = []
        for colour, (place, moment) in zip(COLOURS, drawn):
            begin, end = moment_frames(moment, FRAMES)
            visible = int(rng.integers(VISIBLE[0], VISIBLE[1] + 1))
            start = int(rng.integers(begin, end - visible + 1))
            shape, digit = str(rng.choice(SHAPES)), str(rng.choice(DIGITS))
            needles.append(Needle(colour, shape, digit, place, moment, start, visible))
        if len({needle.first_frame for needle in needles}) == len(needles):
            return tuple(needles)


def _ask(
    kind: str, answer: str, needles: Sequence[Needle], earlier_named: bool, rng: np.random.Generator
) -> Turn | None:
    """A question of a kind with an answer in the benchmark's words; None: these needles have none."""
    if kind == "order":
        # Needles of one quarter overlap in time: only those of different ones are asked about.
        early = next(needle for needle in needles if needle.colour == answer)
        later = [n for n in needles if MOMENTS.index(n.moment) > MOMENTS.index(early.moment)]
        if not later:
            return None
        return order_turn(early, later[int(rng.integers(len(later)))], earlier_named)
    attribute, asking = {"where": ("place", where_turn), "when": ("moment", when_turn)}[kind]
    found = [needle for needle in needles if getattr(needle, attribute) == answer]
    return asking(found[int(rng.integers(len(found)))]) if found else None


@one_line_errors("crowded")
def main(argv: Sequence[str]) -> None:
    """Reads the command line, writes the data and says what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the split")
    parser.add_argument("--samples", type=whole(1, 100_000), default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=whole(1, 64), default=2, help="rendering threads")
    args = parser.parse_args(argv)
    plans = plan_samples(args.samples, args.seed, "validation")
    coverage = [plan.coverage() for plan in plans]
    chance = {kind: fmean(1 / len(p.turn.choices) for p in plans if p.turn.kind == kind) for kind in KINDS}
    description = {
        "split": "validation",
        "seed": args.seed,
        "samples": args.samples,
        "task": {"frames": FRAMES, "seconds": SECONDS, "size": SIZE, "visible_frames": list(VISIBLE)},
        "chance": chance,
    }
    print(
        f"{args.samples} clips of {FRAMES * SIDE * SIDE} visual tokens; {len(COLOURS)} needles cover "
        f"{fmean(coverage):.1%} of them ({min(coverage):.1%} to {max(coverage):.1%}), what a question is about "
        f"{fmean(len(plan.meta()['evidence']) for plan in plans) / (FRAMES * SIDE * SIDE):.1%}; chance "
        f"{fmean(1 / len(plan.turn.choices) for plan in plans):.1%}"
    )
    render = partial(CrowdedPlan.render, held_out=True)
    write_split(args.out / "validation", plans, render, description, SIZE, True, args.workers)


if __name__ == "__main__":
    main(sys.argv[1:])
