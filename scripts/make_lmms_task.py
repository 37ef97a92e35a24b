"""Makes a task of lmms-eval from a data set: what hybridprune evaluate asks, for lmms-eval's command line.

    python scripts/make_lmms_task.py --data runs/demo/data/validation --out runs/demo/lmms_task
    python -m lmms_eval --model huggingface --tasks hybridprune_needle --include_path runs/demo/lmms_task \\
        --model_args pretrained=runs/demo/hf,trust_remote_code=True,device=cpu,device_map=cpu

Writes ``questions.jsonl``, ``videos/`` and the task's own files (``recipes/lmms_eval``) into one folder, which needs
nothing of this project. The data are shards with one video, one question and its answer a sample, as hybridprune shards
and ``scripts/make_demo_data.py`` write them; the right answer is the meta's, else the conversation's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridprune_megatron.config.one_line import one_line_errors, whole

if TYPE_CHECKING:
    from hybridprune_megatron.data.known import Known
    from hybridprune_megatron.data.stored_samples import StoredSample

COMMAND = "scripts/make_lmms_task.py"
TASK_FILES = Path(__file__).resolve().parents[1] / "recipes" / "lmms_eval"
QUESTIONS_FILE = "questions.jsonl"
TASK_FILE = "hybridprune_needle.yaml"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Energon data set of held-out clips")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier task there is replaced")
    parser.add_argument(
        "--max-new-tokens", type=whole(1, 2**20), default=32, help="longest prediction (default %(default)s)"
    )
    return parser.parse_args(argv)


@one_line_errors("make_lmms_task")
def main(argv: list[str]) -> None:
    """Writes the task; what is wrong ends it with one line and code 2."""
    options = parse_arguments(argv)
    count = write_task(options.data, options.out, options.max_new_tokens)
    print(f"{count} questions; for lmms-eval: --tasks hybridprune_needle --include_path {options.out}")


def write_task(data: Path, out: Path, max_new_tokens: int) -> int:
    """Writes the folder, whole or not at all, and returns the number of questions.

    Args:
        max_new_tokens: of a prediction.

    Raises:
        ValueError: no shards, a sample that lmms-eval would ask in another way than our evaluation, or a folder that
            holds something else.
    """
    from hybridprune_megatron.config.outputs import check_output, whole_folder

    check_output(out, COMMAND, [data, TASK_FILES])
    # After the arguments are checked: this takes seconds to import.
    from hybridprune_megatron.data.stored_samples import read_samples

    with whole_folder(out, COMMAND, [data, TASK_FILES]) as folder:
        shutil.copytree(TASK_FILES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        task = folder / TASK_FILE
        text, count = re.subn(r"(max_new_tokens: )\d+", rf"\g<1>{max_new_tokens}", task.read_text())
        assert count == 1, f"{TASK_FILE} says {count} times how long a prediction is"
        task.write_text(text)
        (folder / "videos").mkdir()
        lines = []
        for index, sample in enumerate(read_samples(data)):
            asked, known = question_of(sample)
            (clip,) = sample.videos
            if not isinstance(clip, bytes):
                raise ValueError(f"sample {sample.key} has features in place of its video: give --data with videos")
            # Whatever the container: readers look into the file, and lmms-eval takes this name for a video.
            video = f"videos/{index:06d}.mp4"
            (folder / video).write_bytes(clip)
            about = {"key": sample.key, "kind": known.kind or "", "question": asked, "answer": known.answer}
            lines.append(json.dumps({"video": video, **about}) + "\n")
        (folder / QUESTIONS_FILE).write_text("".join(lines), encoding="ascii")
    return len(lines)


def question_of(sample: StoredSample) -> tuple[str, Known]:
    """The text after the video, from which lmms-eval's messages become the exact prompt of our evaluation, and what is
    known about its answer, which is the conversation's where the meta has none.

    Raises:
        ValueError: the sample is more than a video, a question and an answer, or its meta is malformed.
    """
    from hybridprune_megatron.data.conversation import VIDEO_TOKEN, read_conversation
    from hybridprune_megatron.data.known import Known

    conversation = read_conversation(sample.messages)
    asked, said = conversation.questions[0], conversation.answers[0] if conversation.answers else None
    alone = conversation.system is None and len(conversation.questions) == len(sample.videos) == 1
    if not alone or not asked.startswith(VIDEO_TOKEN) or asked.count(VIDEO_TOKEN) != 1:
        raise ValueError(
            f"sample {sample.key}: lmms-eval asks {VIDEO_TOKEN}, then a question, once; "
            f"this conversation is {sample.messages!r:.80}"
        )
    try:
        known = Known.of(sample.meta, said)
    except ValueError as error:
        raise ValueError(f"sample {sample.key}: {error}") from None
    right = said if known.answer is None else known.answer
    if right is None or not right.strip():
        raise ValueError(f"sample {sample.key} has no answer, in its conversation or under meta")
    return asked.removeprefix(VIDEO_TOKEN).removeprefix("\n"), replace(known, answer=right.strip())


if __name__ == "__main__":
    main(sys.argv[1:])
