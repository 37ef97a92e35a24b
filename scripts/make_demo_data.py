"""Makes the demo's data: real clips with rendered needles, and questions whose answers are known.

    python scripts/make_demo_data.py --out runs/demo/data --train 400 --validation 128

Writes ``<out>/train`` and ``<out>/validation`` as Energon data sets, each with a ``needles.json`` that gives chance for
every kind of question. Held-out clips come from a part of the real clips that training never sees. A split that is
already there with the same settings is left as it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridprune_megatron.data.needles import (
    CHOICES,
    KINDS,
    NeedlePlan,
    NeedleTask,
    load_backgrounds,
    plan_samples,
    render_sample,
)

DESCRIPTION_FILE = "needles.json"


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
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="rendering processes")
    args = parser.parse_args(argv)
    try:
        task = NeedleTask(args.frames, args.fps, args.size, args.needles, args.questions_per_video, tuple(args.kinds))
        for split, count in (("train", args.train), ("validation", args.validation)):
            if count:
                write_split(args.out, split, count, task, args.seed, args.workers)
    except ValueError as error:
        sys.exit(f"make_demo_data: {error}")


def write_split(out: Path, split: str, count: int, task: NeedleTask, seed: int, workers: int) -> None:
    """Writes one data set, unless it is there already."""
    from hybridprune_megatron.data.shards import ShardWriter

    held_out = split != "train"
    plans = plan_samples(task, count, seed, split)
    description = describe(plans, task, seed, split)
    present = out / split / DESCRIPTION_FILE
    if present.is_file() and json.loads(present.read_text()) == description:
        print(f"{out / split}: already there")
        return
    if (out / split).exists() and not present.is_file():
        raise ValueError(f"{out / split} exists and holds something else: choose another --out")
    render = partial(render_sample, task=task, held_out=held_out)
    # Energon's reader asks for train and val parts; "val" is its own word for what is held out.
    writer = ShardWriter(out / split, "val" if held_out else "train", replace=True)
    with writer, rendering_pool(workers, task.size) as each:
        for plan, clip in zip(tqdm(plans, desc=split, unit="clip"), each(render, plans)):
            writer.add(plan.key, plan.conversation(), [("mp4", clip)], plan.meta())
        writer.add_file(DESCRIPTION_FILE, description)


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


@contextmanager
def rendering_pool(workers: int, size: int) -> Iterator[Any]:
    """An ordered map over processes; the backgrounds are decoded once and shared by fork."""
    load_backgrounds(size)
    if workers <= 1:
        yield map
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield partial(pool.imap, chunksize=4)


if __name__ == "__main__":
    main()
