"""Makes an Energon data set from a folder of videos and a file of conversations.

    hybridprune shards --conversations train.jsonl --videos videos --out data/train
    hybridprune shards --conversations held_out.jsonl --videos videos --out data/validation --split val

A row is one conversation; ``<video>`` stands where a video is shown, and paths are relative to the folder of videos:

    {"id": "a1", "video": "cat.mp4", "conversations": [{"role": "user", "content": "<video>\\nWhat is it?"}, {"role":
    "assistant", "content": "A cat."}]}
    {"video": "cat.mp4", "question": "What is it?", "answer": "cat", "choices": ["cat", "dog"], "kind": "animal"}

Rows are the lines of a JSONL file, the elements of a JSON array, or the rows of a parquet or Arrow file or of a folder
that Hugging Face datasets saved. Several videos are a list under "videos"; images are under "image" or "images", and
``<image>`` stands where one is shown. The rows of LLaVA, LLaVA-Video, ShareGPT,
LLaMA-Factory and OpenAI's "messages" are read as they are (docs/data.md); what is not a local file is never fetched,
and a row with media that are not read, as "audio", is left out. Any row may say the right "answer" (if it is not what
the assistant says last), the "choices" it is one of, and the "kind" of the question: hybridprune evaluate reads them
from the sample's meta. Every row becomes a sample, whatever its id, which is kept in the meta too. A row that training
would always leave out, as one whose video does not decode to its end, is left out, counted and listed in
``<out>/report.json``, or in ``<out>.report.json`` where no row can be used. The data set appears under its name only
when complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.data.in_order import in_order
from hybridprune_megatron.data.left_out import LeftOut
from hybridprune_megatron.data.row_files import rows_at
from hybridprune_megatron.data.rows import BadRowError, Row, check_row, known_of, unique_key
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.data.video_folder import VideoFolder

REPORT_FILE = "report.json"


@dataclass
class Report(LeftOut):
    """What became of the rows.

    Attributes:
        samples: rows that became a sample.
    """

    samples: int = 0

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"samples": self.samples, "left_out": dict(self.left_out), "rows": self.rows}

    def lines(self) -> list[str]:
        """For whoever waits: the counts, and the first rows that were left out."""
        return [f"{self.samples} samples, {self.words('rows')}", *self.first()]


@one_line_errors("shards")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, writes the data set, and says what was left out."""
    parser = argparse.ArgumentParser(
        prog="hybridprune shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--conversations", type=Path, required=True, help="JSONL, a JSON array, a table, or a folder of tables"
    )
    parser.add_argument(
        "--videos", type=Path, required=True, help="folder that paths of videos and images are relative to"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="val for data.validation")
    parser.add_argument("--samples-per-shard", type=int, default=500, help="at least 1 (default %(default)s)")
    parser.add_argument("--source-split", help="which split of a folder of tables is read, if it has several")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode videos (default %(default)s)")
    args = parser.parse_args(argv)
    report = write_dataset(
        args.conversations, args.videos, args.out, args.split, args.samples_per_shard, args.source_split, args.workers
    )
    lines = report.lines()
    if not report.samples:
        print(*lines[1:], sep="\n", file=sys.stderr)
        raise ValueError(f"{args.conversations}: {lines[0]}; nothing was written but {_lone_report(args.out)}")
    print(f"{args.out}: {lines[0]}", *lines[1:], sep="\n")


def write_dataset(
    conversations: Path,
    videos: Path,
    out: Path,
    split: str,
    samples_per_shard: int,
    source_split: str | None = None,
    workers: int = 1,
) -> Report:
    """Writes a data set, or only a report if no row can be used. The same rows give the same bytes.

    Args:
        conversations: what ``rows_at`` reads.
        videos: folder that paths are relative to.
        out: folder of the data set.
        split: Energon's part of it.
        samples_per_shard: at least 1.
        source_split: which split of a folder of tables.
        workers: threads that prepare samples.

    Raises:
        ValueError: ``out`` exists, ``samples_per_shard`` or ``workers`` is below 1, or as ``rows_at`` does.
        OSError: the file of conversations cannot be read.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1")
    writer = ShardWriter(out, split, samples_per_shard)
    report, rows = Report(), rows_at(conversations, source_split)
    prepare = partial(_prepared, VideoFolder(videos))
    keys: set[str] = set()
    try:
        with writer, tqdm(total=rows.count, unit="sample", desc=conversations.name) as bar:
            for prepared in in_order(prepare, rows.each, workers):
                if prepared.error is not None:
                    report.leave_out(prepared.error.reason, f"row {prepared.number}: {prepared.error}")
                else:
                    keys.add(key := unique_key(prepared.row_id, prepared.number, keys))
                    writer.add(key, prepared.messages, prepared.files, prepared.meta)
                bar.update(1)
            report.samples = writer.num_samples
            if not report.samples:
                # The writer puts away what it began.
                raise _NothingUsable
            writer.add_file(REPORT_FILE, report.content())
    except _NothingUsable:
        _lone_report(out).write_text(json.dumps(report.content(), indent=2) + "\n")
    return report


@dataclass(frozen=True)
class _Prepared:
    """What becomes of a row: a sample, or an error that says why not."""

    number: int
    error: BadRowError | None = None
    row_id: str | int | float | None = None
    messages: Sequence[dict[str, Any]] = ()
    files: Sequence[tuple[str, bytes]] = ()
    meta: dict[str, Any] | None = None


def _prepared(folder: VideoFolder, numbered: tuple[int, Callable[[], Row]]) -> _Prepared:
    number, read = numbered
    try:
        row = read()
        conversation = check_row(row)
        known = known_of(row, conversation.answers[-1])
        files = folder.read(row.videos)
    except BadRowError as error:
        return _Prepared(number, error)
    about = {} if row.id is None else {"id": row.id}
    return _Prepared(number, None, row.id, conversation.messages(), files, about | known.meta())


class _NothingUsable(Exception):
    """No row became a sample."""


def _lone_report(out: Path) -> Path:
    """The report of a data set that is not there."""
    return out.with_name(f"{out.name}.{REPORT_FILE}")
