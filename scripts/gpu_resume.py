"""A short finetuning of the demo, undisturbed, and stopped by SIGTERM and resumed: ``-m scripts.gpu_resume FOLDER``.

On a GPU in bf16, over nccl, with ``trainer.deterministic``; the losses are to be the same digits. ``FOLDER data`` makes
the clips and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
#: What `gpu_day_one.sh prepare` has brought along, where rendering clips needs packages that are not there.
BROUGHT = ROOT / "build" / "gpu_day_one" / "data"
STEPS, STOP_AFTER, STOPPED = 6, 2, 75
CLIPS = 24


def data_folder(folder: Path) -> Path:
    """The demo's clips: brought along, or made here."""
    return BROUGHT if BROUGHT.is_dir() else make_data(folder)


def make_data(folder: Path) -> Path:
    """Renders the clips into a folder ``data`` of this one."""
    made = ["scripts/make_demo_data.py", "--out", str(folder / "data"), "--train", str(CLIPS), "--validation", "0"]
    subprocess.run([sys.executable, *made], cwd=ROOT, check=True)
    return folder / "data"


def command(out: Path, data: Path, precision: str) -> list[str]:
    """The finetuning."""
    return [
        *(
            sys.executable,
            "recipes/finetune.py",
            "experiment=demo",
            f"output_dir={out}",
            f"data.train={data / 'train'}",
        ),
        *("data.validation=null", "trainer.eval_samples=0", "data.num_workers=0", f"trainer.max_steps={STEPS}"),
        *(f"trainer.precision={precision}", "trainer.deterministic=true", "optim.warmup_steps=2"),
        *("exp_manager.create_tensorboard_logger=false",),
    ]


def losses(out: Path) -> list[float]:
    """Of the steps that are in a run's log; a line that is being written is left out."""
    log = out / "train_log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    rows: dict[int, float] = {}
    for line in lines:
        if line.endswith("\n"):
            row: dict[str, Any] = json.loads(line)
            rows[row["step"]] = row["loss"]
    return [rows[step] for step in sorted(rows)]


def stopped(arguments: list[str], out: Path) -> int:
    """Exit status of a run that is asked to stop after some steps."""
    process = subprocess.Popen(arguments, cwd=ROOT)
    try:
        while process.poll() is None and len(losses(out)) < STOP_AFTER:
            time.sleep(0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        return process.wait()
    finally:
        process.kill()


@one_line_errors("gpu_resume")
def main(argv: list[str]) -> None:
    """Both runs in a folder; with the word "data" after it, their data alone."""
    folder, *words = argv
    (make_data if words == ["data"] else compare)(Path(folder))


def compare(folder: Path) -> None:
    """Both runs.

    Raises:
        SystemExit: with the reason; the losses differ, or a run ended otherwise than it was to.
    """
    import torch

    precision = "bf16" if torch.cuda.is_available() else "fp32"
    data = data_folder(folder)
    whole, resumed = folder / "whole", folder / "resumed"
    subprocess.run(command(whole, data, precision), cwd=ROOT, check=True)
    status = stopped(command(resumed, data, precision), resumed)
    if status not in (STOPPED, 0):
        raise SystemExit(f"the run that was asked to stop ended with status {status}, expected {STOPPED}")
    before = len(losses(resumed))
    if status == STOPPED:
        subprocess.run(command(resumed, data, precision), cwd=ROOT, check=True)
    wanted, found = losses(whole), losses(resumed)
    report = {"precision": precision, "status": status, "stopped_after": before, "whole": wanted, "resumed": found}
    (folder / "resume.json").write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")
    if status == 0:
        raise SystemExit(f"the run was over before it could be stopped: {before} steps")
    if len(wanted) != STEPS or found != wanted:
        raise SystemExit(f"losses differ: {found} after a stop at step {before}, {wanted} undisturbed")
    print(f"{precision}: {STEPS} steps, stopped after {before}, the same digits")


if __name__ == "__main__":
    main(sys.argv[1:])
