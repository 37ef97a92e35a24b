"""Writes planned needle samples as an Energon data set: rendered in several threads, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.outputs import check_output, mark_folder
from hybridprune_megatron.data.shards import ShardWriter
from studies.needles.needles import load_backgrounds

DESCRIPTION_FILE = "needles.json"
#: What the marker of such a data set says, whichever script made it.
MADE_BY = "scripts/make_demo_data.py or studies/base/make_bench_data.py"


class SamplePlan(Protocol):
    """A sample before it is rendered."""

    @property
    def key(self) -> str: ...

    def conversation(self) -> list[dict[str, str]]: ...

    def meta(self) -> dict[str, Any]: ...


def write_split[PlanT: SamplePlan](
    folder: Path,
    plans: Sequence[PlanT],
    render: Callable[[PlanT], bytes],
    description: dict[str, Any],
    size: int,
    held_out: bool,
    workers: int,
) -> None:
    """Writes one data set, unless it is there already.

    Args:
        folder: of the data set; its name is the split's.
        plans: samples in order.
        render: makes the MP4 of a plan; runs in other threads.
        description: goes to ``needles.json``; a data set with an equal one is left as it is.
        size: side of the clips in pixels.
        held_out: whether nothing trains on it.
        workers: rendering threads.

    Raises:
        ValueError: the folder holds something else.
    """
    present = folder / DESCRIPTION_FILE
    if present.is_file() and read_json(present) == description:
        print(f"{folder}: already there")
        return
    check_output(folder, MADE_BY)
    # Energon's reader asks for train and val parts; "val" is its own word for what is held out.
    writer = ShardWriter(folder, "val" if held_out else "train", replace=True)
    load_backgrounds(size)
    # Threads, for decoding, scaling and encoding leave the interpreter to others, and a process that runs threads, as
    # Energon's does, cannot be forked safely.
    with writer, ThreadPoolExecutor(workers) as renderers:
        for plan, clip in zip(tqdm(plans, desc=folder.name, unit="clip"), renderers.map(render, plans)):
            writer.add(plan.key, plan.conversation(), [("mp4", clip)], plan.meta())
        writer.add_file(DESCRIPTION_FILE, description)
    mark_folder(folder, MADE_BY)
