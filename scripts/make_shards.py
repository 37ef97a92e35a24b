"""Makes an Energon data set from a folder of videos and a JSONL of conversations.

    python scripts/make_shards.py --conversations train.jsonl --videos videos --out data/train
    python scripts/make_shards.py --conversations held_out.jsonl --videos videos --out data/validation --split val

A row is one conversation; ``<video>`` stands where a video is shown, and paths are relative to the folder of videos:

    {"id": "a1", "video": "cat.mp4", "conversations": [{"role": "user", "content": "<video>\\nWhat is it?"}, {"role":
    "assistant", "content": "A cat."}]}

Several videos are a list under "videos". {"from": "human" | "gpt", "value": ...} is read as well. Rows that cannot be
used are left out, counted and listed in ``<out>/report.json``. The data set appears under its name only when complete.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.data.conversation import read_conversation
from hybridprune_megatron.data.shards import VIDEO_EXTENSIONS, ShardWriter
from hybridprune_megatron.data.video import FrameSampling, probe_video

REPORT_FILE = "report.json"
#: Rows that the report lists one by one; all are counted.
MAX_LISTED = 100
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class BadRowError(ValueError):
    """A row that is left out.

    Attributes:
        reason: what the report counts it under.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@one_line_errors("make_shards")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, writes the data set, and says what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=Path, required=True, help="JSONL, one conversation a row")
    parser.add_argument("--videos", type=Path, required=True, help="folder that video paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="val for data.validation")
    parser.add_argument("--samples-per-shard", type=int, default=500)
    args = parser.parse_args(argv)
    try:
        report = write_dataset(args.conversations, args.videos, args.out, args.split, args.samples_per_shard)
    except (ValueError, OSError) as error:
        sys.exit(f"make_shards: {error}")
    left_out = sum(report["left_out"].values())
    print(f"{args.out}: {report['samples']} samples, {left_out} rows left out {report['left_out'] or ''}")


def write_dataset(conversations: Path, videos: Path, out: Path, split: str, samples_per_shard: int) -> dict[str, Any]:
    """Writes a data set; returns its report.

    Raises:
        ValueError: ``out`` exists, or no row can be used.
        OSError: the JSONL cannot be read.
    """
    left_out: Counter[str] = Counter()
    listed: list[str] = []
    with ShardWriter(out, split, samples_per_shard) as writer:
        for number, line in _rows(conversations):
            try:
                key, messages, files = read_row(line, number, videos)
                writer.add(key, messages, files)
            except ValueError as error:
                left_out[error.reason if isinstance(error, BadRowError) else "key"] += 1
                if len(listed) < MAX_LISTED:
                    listed.append(f"row {number}: {error}")
        report = {"samples": writer.num_samples, "left_out": dict(left_out), "rows": listed}
        writer.add_file(REPORT_FILE, report)
    return report


def read_row(line: str, number: int, folder: Path) -> tuple[str, list[dict[str, Any]], list[tuple[str, bytes]]]:
    """Checks a row: its key, its messages, and the extension and bytes of its videos.

    Raises:
        BadRowError: the row cannot be used.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRowError("json", f"no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise BadRowError("conversation", 'expected an object with a list under "conversations"')
    messages = [_message(each) for each in row["conversations"]]
    names = row.get("videos", [row["video"]] if "video" in row else [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRowError("video", f"videos {names!r:.60}: expected paths")
    try:
        conversation = read_conversation(messages)
    except ValueError as error:
        raise BadRowError("conversation", str(error)) from error
    if len(conversation.answers) != len(conversation.questions) or not all(conversation.answers):
        raise BadRowError("conversation", "an answer is missing or empty")
    if conversation.num_videos != len(names):
        raise BadRowError("video", f"{conversation.num_videos} <video> in the conversation, {len(names)} videos")
    # A key holds no dot and no slash: both mean something in the name of a tar member.
    key = re.sub(r"[^A-Za-z0-9_-]", "_", str(row.get("id", "")))
    return key or f"row-{number:08d}", messages, [_video(folder, name) for name in names]


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered rows that are not empty, with a progress bar over bytes."""
    with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.decode("utf-8", errors="replace")
            bar.update(len(line))


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and {"from", "value"} <= set(message):
        return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    return message


def _video(folder: Path, name: str) -> tuple[str, bytes]:
    path = (folder / name).resolve()
    # A row comes from somewhere else: it may only name files below the folder that the user gave.
    if not path.is_relative_to(folder.resolve()):
        raise BadRowError("video", f"{name} is not below {folder}")
    extension = path.suffix[1:].lower()
    if extension not in VIDEO_EXTENSIONS:
        raise BadRowError("video", f"{name}: type {extension!r} is none of {', '.join(VIDEO_EXTENSIONS)}")
    try:
        data = path.read_bytes()
        probe_video(data, FrameSampling(num_frames=2), name)
    except (OSError, ValueError) as error:
        raise BadRowError("video", str(error)) from error
    return extension, data


if __name__ == "__main__":
    main()
