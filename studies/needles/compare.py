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
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.one_line import one_line_errors
from studies.demo.report import markdown_table
from studies.needles.intervals import mean_of

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.evaluation.held_out import Question
    from hybridprune_megatron.method.reduction import Reduction


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
    known = _read(options.out, facts)
    wanted = [each for each in options.reductions if each not in known]
    for row in _measured(options, wanted):
        known[row["reduction"]] = row
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row | facts) + "\n")
    header = ("reduction", "accuracy", "KL", "log(1 + KL / 0.01)", "tokens")
    rows = [known[each] for each in options.reductions]
    print(markdown_table([header, *(_cells(row) for row in rows)]))


def _read(path: Path | None, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path and path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {row["reduction"]: row for row in rows if {name: row[name] for name in facts} == facts}


def _measured(options: argparse.Namespace, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not wanted:
        return
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.analysis.damage import divergence
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.evaluation.held_out import load_questions
    from hybridprune_megatron.models.build import build_reduction

    common = ["experiment=bench", f"data.validation={options.data}"]
    configs = {each: load_config([*common, *shlex.split(each)]) for each in wanted}
    full = load_config([*common, "reduction=none"])
    model = load_model(Path(options.weights), full)
    questions = load_questions(full, options.clips)
    references = [logits for logits, _ in answers(model, questions, None)]
    for name, cfg in configs.items():
        right, damages = [], []
        reduced = answers(model, questions, build_reduction(cfg))
        for reference, (logits, labels) in zip(references, reduced, strict=True):
            right.append(bool((logits.argmax(-1) == labels).all()))
            damages.append(round(divergence(reference, logits), 6))
        correct = "".join(str(int(each)) for each in right)
        yield {"reduction": name, "correct": correct, "kl": damages, "retention": list(cfg.retention_by_layer)}


def answers(model: Any, questions: Sequence[Question], reduction: Reduction | None) -> Iterator[tuple[Tensor, Tensor]]:
    """[A, vocabulary] logits and [A] labels of every question's answer."""
    from hybridprune_megatron.analysis.damage import answer_logits
    from hybridprune_megatron.data.batch import IGNORE_LABEL, pack
    from hybridprune_megatron.evaluation.forward import device_of, length_multiple, measuring

    with measuring(model, reduction):
        for question in questions:
            batch = pack([question.sample], length_multiple(model, reduction)).to(device_of(model))
            yield answer_logits(model, batch), batch.labels[batch.labels != IGNORE_LABEL]


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
