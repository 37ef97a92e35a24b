"""Who looks at the question: every method on crowded clips, scored by the question that is asked and by another one.

    python -m studies.needles.question --out docs/study/question.jsonl
    python -m studies.needles.question --out docs/study/question.jsonl "reduction=query" "reduction=evs"

Needs the clips and features of ``studies.needles.crowded``. First the oracles say whether these clips can tell: keeping
what is asked for must beat keeping as much of other needles by 20 points. Then every method answers at its budget, once
as it is and once with the tokens that another question about the same clip chose. Who loses nothing by that does not
look at the question: it is saliency. Each argument is one reduction, overrides of ``experiment=bench`` with a blank
between them. The file has a row per reduction; one that is there is not measured again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.one_line import one_line_errors, whole
from hybridprune_megatron.config.stored_run import find_checkpoint
from studies.demo.report import markdown_table
from studies.needles.intervals import Estimate, accuracy, difference
from studies.needles.rows import append_row, rows_with

if TYPE_CHECKING:
    from hybridprune_megatron.method.reduction import Reduction
    from studies.needles.asked import Asked
    from studies.needles.measure import Measured

BUDGET = 0.25
#: Points that keeping what is asked for must be ahead of keeping what is not.
WANTED = 0.20
FULL, ASKED, NOT_ASKED = "every token", "oracle: what is asked for", "oracle: as much of what is not"
ORACLES = {
    ASKED: "evidence",
    "oracle: what is asked for, and around it": "evidence_and_neighbours",
    NOT_ASKED: "not_asked",
}
METHODS = (
    "reduction=query",
    "reduction=evs",
    "reduction=plateau",
    "reduction=attention_only",
    "reduction=mamba_only",
    "reduction=query reduction.score=random",
    "reduction=pyramiddrop",
    "reduction=query_signed",
)


@one_line_errors("question")
def main(argv: Sequence[str]) -> None:
    """Measures what the file lacks, and prints the table and the verdict; exits with 1 if the clips cannot tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/crowded/features", help="clips (default %(default)s)")
    parser.add_argument("--clips", type=whole(1, 100_000), default=120, help="the first ones (default %(default)s)")
    parser.add_argument("--weights", default="assets/bench/base.safetensors", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="rows of JSON that this adds to")
    parser.add_argument("reductions", nargs="*", default=list(METHODS), metavar="overrides")
    options = parser.parse_args(argv)
    facts = {"weights": options.weights, "data": options.data, "clips": options.clips}
    names = [FULL, *ORACLES, *options.reductions]
    known = rows_with(options.out, facts)

    def keep(row: dict[str, Any]) -> None:
        known[row["reduction"]] = row
        append_row(options.out, row | facts)

    if missing := [name for name in names if name not in known]:
        measure_all(options, missing, keep)
    print(markdown_table(table([known[name] for name in names])))
    gap = difference([known[ASKED]], [known[NOT_ASKED]])
    tells = gap.mean >= WANTED
    print(
        f"\nWhat is asked for against as much of what is not: {points(gap)}. These clips can "
        f"{'tell' if tells else 'NOT tell'} who looks at the question (at least {100 * WANTED:.0f} points)."
    )
    if not tells:
        sys.exit(1)


def measure_all(options: argparse.Namespace, names: Sequence[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Hands out a row for every name."""
    # Wrong overrides are refused before the model is built.
    methods = {name: load_config(_overrides(options, name)) for name in names if name not in (FULL, *ORACLES)}
    from tqdm import tqdm

    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.models.build import build_reduction
    from studies.needles.asked import read_asked
    from studies.needles.measure import measure, references
    from studies.needles.oracles import oracle

    cfg = load_config(_overrides(options, "reduction=none"))
    weights = Path(options.weights)
    model = load_model(find_checkpoint(weights) if weights.is_dir() else weights, cfg)
    rows = read_asked(cfg, options.clips)
    full = list(tqdm(references(model, rows), desc="references", total=len(rows), unit="clip"))
    for name in names:
        reduction: Reduction | Callable[[Asked], Reduction] | None = None
        if name in ORACLES:
            reduction = partial(oracle, case=ORACLES[name], share=BUDGET, layers=model.config.num_layers)
        elif name != FULL:
            reduction = build_reduction(methods[name])
        with tqdm(desc=name, total=len(rows), unit="clip") as bar:
            keep({"reduction": name, **as_row(measure(model, rows, reduction, full, progress=bar.update), rows)})


def _overrides(options: argparse.Namespace, reduction: str) -> list[str]:
    return ["experiment=bench", f"data.validation={options.data}", *shlex.split(reduction)]


def as_row(found: Measured, rows: Sequence[Asked]) -> dict[str, Any]:
    """Plain values of a measurement."""
    return {
        "correct": "".join(str(int(each)) for each in found.right),
        "correct_by_another": "".join(str(int(each)) for each in found.right_by_another),
        "kl": [round(value, 6) for value in found.kl],
        "kinds": [row.meta["kind"] for row in rows],
        "retention": round(fmean(found.retention), 4),
    }


def points(gap: Estimate) -> str:
    """A difference in points with its interval, bold where it excludes 0."""
    text = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    return f"**{text}**" if gap.excludes_zero else text


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line a row: accuracy, by kind, when another question scored, what that costs, divergence, tokens."""
    kinds = sorted(set(rows[0]["kinds"]))
    lines = [("tokens kept by", "accuracy", *kinds, "scored by another question", "lost by it", "KL", "tokens")]
    for row in rows:
        all_of, by_another = accuracy([row]), {"correct": row["correct_by_another"]}
        another, lost = "", ""
        if by_another["correct"]:
            another = f"{100 * accuracy([by_another]).mean:.1f} %"
            lost = points(difference([row], [by_another]))
        right = {kind: [int(m) for m, own in zip(row["correct"], row["kinds"]) if own == kind] for kind in kinds}
        lines.append(
            (
                f"`{row['reduction']}`" if "=" in row["reduction"] else row["reduction"],
                f"{100 * all_of.mean:.1f} % ({100 * all_of.low:.0f}-{100 * all_of.high:.0f})",
                *(f"{100 * fmean(marks):.0f} %" for marks in right.values()),
                another,
                lost,
                f"{fmean(row['kl']):.3f}",
                f"{row['retention']:.3f}",
            )
        )
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
