"""Makes the study's data: long real clips with several needles and a ghost (studies/needles/bench.py).

    python studies/base/make_bench_data.py --out runs/study/data --train 1000 --validation 384

Writes ``<out>/train`` and ``<out>/validation`` as Energon data sets, each with a ``needles.json`` that gives chance for
every kind of question. A training clip is asked several questions, a held-out clip one. Held-out clips come from a part
of the real clips that training never sees. A split that is already there with the same settings is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
# The studies are not installed.
sys.path.insert(0, str(ROOT))

from studies.needles.bench import BenchPlan, BenchTask  # noqa: E402
from studies.needles.needle_shards import write_split  # noqa: E402


@one_line_errors("make_bench_data")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits")
    parser.add_argument("--train", type=int, default=1000, help="training samples (0 = none)")
    parser.add_argument("--validation", type=int, default=384, help="held-out samples (0 = none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=128, help="frames a clip")
    parser.add_argument("--seconds", type=int, default=64, help="length of a clip")
    parser.add_argument("--size", type=int, default=128, help="side of a clip in pixels")
    parser.add_argument("--visible-frames", type=int, nargs=2, default=(4, 8), metavar=("FEWEST", "MOST"))
    parser.add_argument("--ghost-opacity", type=float, default=0.3, help="0 (nothing to see) to 1")
    parser.add_argument("--questions-per-video", type=int, default=12, help="question turns of a training sample")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="rendering threads")
    args = parser.parse_args(argv)
    task = BenchTask(
        args.frames,
        args.seconds,
        args.size,
        tuple(args.visible_frames),
        args.ghost_opacity,
        args.questions_per_video,
    )
    for split, count in (("train", args.train), ("validation", args.validation)):
        if count:
            held_out = split != "train"
            asked = replace(task, questions_per_video=1, recall_apart=True) if held_out else task
            plans = asked.plan(count, args.seed, split)
            description = describe(plans, asked, args.seed, split)
            render = partial(BenchPlan.render, held_out=held_out)
            write_split(args.out / split, plans, render, description, task.size, held_out, args.workers)


def describe(plans: Sequence[BenchPlan], task: BenchTask, seed: int, split: str) -> dict[str, Any]:
    """What an evaluation needs to know about a split: chance, and how often every answer of a first question comes."""
    first = [plan.turns[0] for plan in plans]
    kinds = sorted({turn.kind for turn in first})
    answers = {kind: Counter(turn.answer for turn in first if turn.kind == kind) for kind in kinds}
    return {
        "split": split,
        "seed": seed,
        "samples": len(plans),
        "task": asdict(task) | {"visible_frames": list(task.visible_frames)},
        "chance": {kind: fmean([1 / len(turn.choices) for turn in first if turn.kind == kind]) for kind in kinds},
        "answers": {kind: dict(sorted(answers[kind].items())) for kind in kinds},
    }


if __name__ == "__main__":
    main()
