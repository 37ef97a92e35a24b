"""Reductions side by side on clips that the study does not use: accuracy, and divergence (KL) from every token.

    python studies/base/make_bench_data.py --out runs/bench/tuning --seed 21 --train 1 --validation 280
    python scripts/precompute_features.py experiment=bench model.init_checkpoint=assets/bench/base.safetensors \\
        --data runs/bench/tuning/validation --out runs/bench/tuning_features
    python -m studies.needles.compare --out docs/study/compare.jsonl reduction=query reduction=attention_only

Each argument is one reduction: overrides of ``experiment=bench`` with a blank between them. The file has a row per
reduction; one that is there already is not measured again. Shapes and scores are chosen on these clips, never on the
study's own.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.one_line import one_line_errors
from studies.demo.report import markdown_table
from studies.needles.intervals import mean_of
from studies.needles.rows import append_row, rows_with


@one_line_errors("compare")
def main(argv: Sequence[str]) -> None:
    """Measures what the file lacks and prints all asked for as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/bench/tuning_features", help="clips (default %(default)s)")
    parser.add_argument("--clips", type=int, default=140, help="the first ones of them (default %(default)s)")
    parser.add_argument("--weights", default="assets/bench/base.safetensors", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="rows of JSON that this adds to")
    parser.add_argument("reductions", nargs="+", metavar="overrides")
    options = parser.parse_args(argv)
    facts = {"weights": options.weights, "data": options.data, "clips": options.clips}
    known = rows_with(options.out, facts)
    wanted = [each for each in options.reductions if each not in known]
    for row in _measured(options, wanted):
        known[row["reduction"]] = row
        append_row(options.out, row | facts)
    header = ("reduction", "accuracy", "KL", "log(1 + KL / 0.01)", "tokens")
    rows = [known[each] for each in options.reductions]
    print(markdown_table([header, *(_cells(row) for row in rows)]))


def _measured(options: argparse.Namespace, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not wanted:
        return
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.models.build import build_reduction
    from studies.needles.asked import read_asked
    from studies.needles.measure import measure, references

    common = ["experiment=bench", f"data.validation={options.data}"]
    configs = {each: load_config([*common, *shlex.split(each)]) for each in wanted}
    full = load_config([*common, "reduction=none"])
    model = load_model(Path(options.weights), full)
    rows = read_asked(full, options.clips)
    every_token = list(references(model, rows))
    for name, cfg in configs.items():
        found = measure(model, rows, build_reduction(cfg), every_token, control=False)
        correct = "".join(str(int(each)) for each in found.right)
        damages = [round(each, 6) for each in found.kl]
        yield {"reduction": name, "correct": correct, "kl": damages, "retention": list(cfg.retention_by_layer)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    damages = np.asarray(row["kl"])
    kl = mean_of(damages)
    return (
        f"`{row['reduction']}`",
        f"{fmean(int(mark) for mark in row['correct']):.1%}",
        f"{kl.mean:.3f} ({kl.low:.3f} to {kl.high:.3f})",
        f"{np.log1p(damages / 0.01).mean():.2f}",
        f"{fmean(row['retention']):.3f}",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
