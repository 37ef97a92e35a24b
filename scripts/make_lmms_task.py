"""Makes a task of lmms-eval from held-out clips: what our own evaluation asks, for lmms-eval's command line.

    python scripts/make_lmms_task.py --data runs/demo/data/validation --out runs/demo/lmms_task
    python -m lmms_eval --model huggingface --tasks hybridprune_needle --include_path runs/demo/lmms_task \\
        --model_args pretrained=runs/demo/hf,trust_remote_code=True,device=cpu,device_map=cpu

Writes ``questions.jsonl``, ``videos/`` and the task's own files (``recipes/lmms_eval``) into one folder, which needs
nothing of this project. The data are shards with one video, one question and its known answer a sample, as
``scripts/make_demo_data.py`` and ``studies/base/make_bench_data.py`` write them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridprune_megatron.config.one_line import one_line_errors

if TYPE_CHECKING:
    from hybridprune_megatron.evaluation.held_out import Clip

COMMAND = "scripts/make_lmms_task.py"
TASK_FILES = Path(__file__).resolve().parents[1] / "recipes" / "lmms_eval"
QUESTIONS_FILE = "questions.jsonl"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Energon data set of held-out clips")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier task there is replaced")
    return parser.parse_args(argv)


@one_line_errors("make_lmms_task")
def main(argv: list[str]) -> None:
    """Writes the task; what is wrong ends it with one line and code 2."""
    options = parse_arguments(argv)
    count = write_task(options.data, options.out)
    print(f"{count} questions; for lmms-eval: --tasks hybridprune_needle --include_path {options.out}")


def write_task(data: Path, out: Path) -> int:
    """Writes the folder, whole or not at all, and returns the number of questions.

    Raises:
        ValueError: no shards, a sample that lmms-eval would ask in another way than our evaluation, or a folder that
            holds something else.
    """
    from hybridprune_megatron.config.outputs import check_output, whole_folder

    check_output(out, COMMAND, [data, TASK_FILES])
    # After the arguments are checked: this takes seconds to import.
    from hybridprune_megatron.evaluation.held_out import read_clips

    with whole_folder(out, COMMAND, [data, TASK_FILES]) as folder:
        shutil.copytree(TASK_FILES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "videos").mkdir()
        lines = []
        for index, clip in enumerate(read_clips(data)):
            question = question_of(clip)
            if not isinstance(clip.video, bytes):
                raise ValueError(f"sample {clip.key} has features in place of its video: give --data with videos")
            # Whatever the container: readers look into the file, and lmms-eval takes this name for a video.
            video = f"videos/{index:06d}.mp4"
            (folder / video).write_bytes(clip.video)
            known = {"key": clip.key, "kind": clip.kind, "question": question, "answer": clip.answer}
            lines.append(json.dumps({"video": video, **known}) + "\n")
        (folder / QUESTIONS_FILE).write_text("".join(lines), encoding="ascii")
    return len(lines)


def question_of(clip: Clip) -> str:
    """The text after the video, from which lmms-eval's messages become the exact prompt of our evaluation.

    Raises:
        ValueError: the conversation is more than a video, a question and the answer.
    """
    from hybridprune_megatron.data.conversation import VIDEO_TOKEN

    roles = [message["role"] for message in clip.messages]
    asked, answered = clip.messages[0]["content"], clip.messages[-1]["content"]
    plain = isinstance(asked, str) and asked.startswith(VIDEO_TOKEN) and asked.count(VIDEO_TOKEN) == 1
    if roles != ["user", "assistant"] or not plain or answered != clip.answer:
        raise ValueError(
            f"sample {clip.key}: lmms-eval asks {VIDEO_TOKEN}, a question, and compares with the answer; "
            f"this conversation is {clip.messages!r:.80}"
        )
    return str(asked).removeprefix(VIDEO_TOKEN).removeprefix("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
