"""Makes the demo's data: real clips with rendered needles, and questions whose answers are known.

    python scripts/make_demo_data.py --out runs/demo/data --train 400 --validation 128

Writes ``<out>/train`` and ``<out>/validation`` as Energon data sets, each with a ``needles.json`` that gives chance for
every kind of question. Held-out clips come from a part of the real clips that training never sees. A split that is
already there with the same settings is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

# The studies are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.needles.needle_shards import write_split
from studies.needles.needles import (
    CHOICES,
    KINDS,
    NeedlePlan,
    NeedleTask,
    plan_samples,
    render_sample,
)


@one_line_errors("make_demo_data")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits")
    parser.add_argument("--train", type=int, default=400, help="training samples (0 = none)")
    parser.add_argument("--validation", type=int, default=128, help="held-out samples (0 = none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=32, help="frames a clip")
    parser.add_argument("--fps", type=int, default=4, help="frames a second")
    parser.add_argument("--size", type=int, default=128, help="side of a clip in pixels")
    parser.add_argument("--needles", type=int, default=1, help="needles a clip; the question names one of several")
    parser.add_argument("--questions-per-video", type=int, default=1, help="question turns a sample")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=f"asked: {', '.join(KINDS)}")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="rendering threads")
    args = parser.parse_args(argv)
    task = NeedleTask(args.frames, args.fps, args.size, args.needles, args.questions_per_video, tuple(args.kinds))
    for split, count in (("train", args.train), ("validation", args.validation)):
        if count:
            held_out = split != "train"
            plans = plan_samples(task, count, args.seed, split)
            render = partial(render_sample, task=task, held_out=held_out)
            description = describe(plans, task, args.seed, split)
            write_split(args.out / split, plans, render, description, task.size, held_out, args.workers)


def describe(plans: Sequence[NeedlePlan], task: NeedleTask, seed: int, split: str) -> dict[str, Any]:
    """What an evaluation needs to know about a split: chance, and how often every answer comes."""
    answers = {kind: Counter(plan.needles[0][kind] for plan in plans if kind in plan.kinds) for kind in CHOICES}
    return {
        "split": split,
        "seed": seed,
        "samples": len(plans),
        "task": asdict(task) | {"ask": list(task.kinds)},
        "chance": {kind: 1 / len(choices) for kind, choices in CHOICES.items()},
        "answers": {kind: {choice: answers[kind][choice] for choice in CHOICES[kind]} for kind in CHOICES},
    }


if __name__ == "__main__":
    main()
