"""Draws what runs have logged, one picture for one run or several: loss, validation, tokens per second.

    hybridprune plot runs/demo
    hybridprune plot runs/sweep/* --out runs/sweep/runs.png

Reads train_log.jsonl and validation_log.jsonl of every folder, also of a run that is still going.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_file, whole_file
from hybridprune_megatron.engine.train_log import TRAIN_LOG, VALIDATION_LOG, read_train_log

COMMAND = "hybridprune plot"
_NAME = "runs.png"


@one_line_errors("plot")
def main(argv: list[str]) -> None:
    """Reads the command line and the logs; a wrong folder ends it with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="folder", help="of a run")
    parser.add_argument(
        "--out", type=Path, help=f"PNG to write; default: {_NAME} in the folder of a single run, else here"
    )
    options = parser.parse_args(argv)
    out = options.out or (options.runs[0] / _NAME if len(options.runs) == 1 else Path(_NAME))
    if out.suffix != ".png":
        raise ValueError(f"--out={out}: a picture is a .png; give such a name")
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: its folder is not there; make it, or give another")
    check_file(out, COMMAND, "--out")
    logs = {}
    for folder in options.runs:
        if not (folder / TRAIN_LOG).is_file():
            raise ValueError(f"{folder}: no {TRAIN_LOG}; give the output_dir of a run that has made a step")
        rows = read_train_log(folder / TRAIN_LOG)
        if not rows:
            raise ValueError(f"{folder}/{TRAIN_LOG} has no step yet; try again when the run has made one")
        validation = folder / VALIDATION_LOG
        logs[str(folder)] = (rows, read_train_log(validation) if validation.is_file() else [])
    from hybridprune_megatron.evaluation.run_plot import plot_runs

    with whole_file(out) as scratch:
        plot_runs(scratch, logs, COMMAND)
    steps = max(rows[-1]["step"] for rows, _ in logs.values())
    print(f"{out}: {len(logs)} run{'s' if len(logs) > 1 else ''}, {steps} steps")
