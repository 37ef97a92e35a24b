"""Memory, bytes on the wire and step time of a training run on 8 to 4,096 H100s, with and without reduction.

    python scripts/scaling.py                                            # prints the tables of docs/scaling.md
    python scripts/scaling.py --write docs/scaling.md --plot docs/scaling.png
    python scripts/scaling.py --budget 0.5 --batch 1024 --set linear=0.5 --set frames_over=model
    python scripts/scaling.py data.sequence_length=65536 reduction=attention_only

Counted from the configuration by hybridprune_megatron/cost, nothing is measured. Arguments without dashes are overrides
as for recipes/finetune.py. docs/scaling.md says what is counted, and names every assumption that --set changes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_file

ROOT = Path(__file__).resolve().parents[1]
# The studies are not installed.
sys.path.insert(0, str(ROOT))

from studies.scaling.assumptions import Assumptions, changed  # noqa: E402
from studies.scaling.report import Comparison, report  # noqa: E402
from studies.scaling.scaling import Scaling, Workload  # noqa: E402

EXPERIMENT = "experiment=nemotron_nano_12b_v2_vl"
BEGIN = "<!-- scaling: begin. Written by scripts/scaling.py --write; do not edit by hand. -->"
END = "<!-- scaling: end -->"


def compare(overrides: Sequence[str], budget: float, batch: int, settings: Sequence[str]) -> Comparison:
    """The comparison that is printed.

    Args:
        overrides: of the configuration, after the 12B experiment.
        budget: mean retention of the reduced side.
        batch: packed sequences a step.
        settings: assumptions as name=value.

    Raises:
        ValueError: one line on what cannot be.
    """
    cfg, assumptions = load_config([EXPERIMENT, *overrides]), changed(Assumptions(), settings)
    full, reduced = (Scaling(Workload.of(cfg, each), assumptions, batch) for each in (1.0, budget))
    return Comparison(full, reduced)


def written(document: str, lines: Sequence[str]) -> str:
    """A document with the tables between its two marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no place for the tables: the document needs the lines '{BEGIN}' and '{END}'")
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


@one_line_errors("scaling")
def main(argv: Sequence[str] | None = None) -> None:
    """Prints or writes the tables, or one line on stderr with exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for recipes/finetune.py")
    parser.add_argument("--budget", type=float, default=0.25, help="mean share of the visual tokens with reduction")
    parser.add_argument("--batch", type=int, default=512, help="packed sequences a step, over all GPUs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="puts the tables between its marks")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draws step time, throughput and their parts")
    args = parser.parse_args(argv)
    if args.plot is not None:
        check_file(args.plot, "scripts/scaling.py", "--plot")
    compared = compare(args.overrides, args.budget, args.batch, args.set)
    lines = list(report(compared))
    if args.write is None:
        print("\n".join(lines))
    else:
        args.write.write_text(written(args.write.read_text(), lines))
    if args.plot is not None:
        from studies.scaling.plot import plot_scaling

        plot_scaling(args.plot, compared)


if __name__ == "__main__":
    main()
