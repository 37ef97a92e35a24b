"""The study: every method at every budget on the needle benchmark, before and after light finetuning.

    studies/base/make_bench_base.sh data
    python recipes/study.py [--workers 2] [--only before] [key=value ...]

Takes the base model of ``experiment=bench``, which is in the repository, and the data that the first command makes.
Measures, the most telling first: accuracy of the base model under every method, light finetuning under every method
and its accuracy, and measured prefill time. Hours of work; every result is one row of docs/study/rows.jsonl as soon as
it is there, a killed study resumes, and docs/study.md is written again every half hour and at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from hybridprune_megatron.config import Config, checked_config
from hybridprune_megatron.config.one_line import one_line_errors, whole

ROOT = Path(__file__).resolve().parents[1]
# The studies are not installed.
sys.path.insert(0, str(ROOT))

from studies.needles.cells import Unit  # noqa: E402
from studies.needles.run import EXPERIMENT, Runner  # noqa: E402

DOCS = ROOT / "docs" / "study"
PAGE = ROOT / "docs" / "study.md"
FIGURE = DOCS / "accuracy.png"
BATCH_TOKENS = 6000
PAGE_SECONDS = 1800


@one_line_errors("study")
def main(argv: list[str]) -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=os.cpu_count() or 1, help="processes of one thread each"
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="units whose stage or method is one of these")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="WORD", help="units whose stage or method is not these"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from the rows")
    parser.add_argument("--no-timing", action="store_true", help="leave the prefill times for another run")
    options, overrides = parser.parse_known_args(argv)
    cfg = checked_config([EXPERIMENT, *overrides])
    failures = study(cfg, overrides, options)
    if failures:
        print("\n".join(["failed units, given up for now; the same command tries them again:", *failures]))
        sys.exit(1)


def study(cfg: Config, overrides: list[str], options: argparse.Namespace) -> list[str]:
    """All of it; returns one line a failed unit."""
    from tqdm import tqdm

    from studies.needles.pool import run_all
    from studies.needles.prefill import time_methods
    from studies.needles.rows import Rows

    settings = settings_of(cfg, overrides)
    rows = Rows(DOCS / "rows.jsonl", settings)
    timings = Rows.read(DOCS / "prefill.jsonl")
    write = partial(write_page, cfg, rows, timings)
    failures: list[str] = []
    if not options.report:
        runner = Runner(tuple(overrides), cfg.trainer.eval_samples, BATCH_TOKENS, threads=1)
        failures = run_all(runner, rows, options.workers, partial(selected, options), seldom(write, PAGE_SECONDS))
        if not options.no_timing:
            runner = replace(runner, threads=os.cpu_count() or 1)
            timings |= time_methods(runner, DOCS / "prefill.jsonl", settings, partial(tqdm, desc="prefill"))
    write()
    return failures


def seldom(write: Callable[[], None], seconds: float) -> Callable[[], None]:
    """A call that writes where the last time is long enough ago: the intervals of a page take a minute of a core."""
    last = time.monotonic()

    def call() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            write()
            last = time.monotonic()

    return call


def selected(options: argparse.Namespace, unit: Unit) -> bool:
    """Whether the command line asks for a unit."""
    words = {unit.stage, unit.method}
    return (options.only is None or bool(words & set(options.only))) and not words & set(options.skip)


def settings_of(cfg: Config, overrides: list[str]) -> dict[str, Any]:
    """What the rows depend on: weights, data, and what the user changed."""
    assert cfg.model.init_checkpoint is not None, "model.init_checkpoint"
    assert cfg.data.validation is not None, "data.validation"
    weights = Path(cfg.model.init_checkpoint)
    if not weights.is_file():
        raise ValueError(f"model.init_checkpoint={weights} is not there: studies/base/make_bench_base.sh makes it")
    needles = Path(cfg.data.validation) / "needles.json"
    if not needles.is_file():
        raise ValueError(
            f"data.validation={needles.parent}: no needles.json; studies/base/make_bench_base.sh data makes it"
        )
    held_out = json.loads(needles.read_text())["samples"]
    if held_out < cfg.trainer.eval_samples:
        raise ValueError(
            f"trainer.eval_samples={cfg.trainer.eval_samples}, but data.validation={needles.parent} holds {held_out} "
            "samples: make as many (studies/base/make_bench_data.py --validation), or ask for fewer"
        )
    return {
        "base": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "samples": cfg.trainer.eval_samples,
        "steps": cfg.trainer.max_steps,
        "overrides": overrides,
    }


def write_page(cfg: Config, rows: Any, timings: dict[str, Any]) -> None:
    """docs/study.md and its figure from the rows so far."""
    from studies.needles.plots import plot_study
    from studies.needles.report import write_report

    found = list(rows.by_key.values())
    needles = json.loads((Path(str(cfg.data.validation)) / "needles.json").read_text())
    chance = fmean(needles["chance"].values())
    plot_study(FIGURE, found, chance)
    findings = (DOCS / "findings.md").read_text() if (DOCS / "findings.md").is_file() else ""
    write_report(PAGE, found, timings, setting_text(cfg, needles, chance), findings, f"study/{FIGURE.name}")


def setting_text(cfg: Config, needles: dict[str, Any], chance: float) -> str:
    """One paragraph on what was measured, from the configuration and the data."""
    from hybridprune_megatron.evaluation.machine import describe_machine

    task, machine, vision = needles["task"], describe_machine(), cfg.model.vision
    assert vision is not None, "model.vision"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"Model `{cfg.model.name}` (`{cfg.model.hybrid_pattern}`, hidden size {cfg.model.hidden_size}), "
        f"{task['frames']} frames and {task['frames'] * vision.tokens_per_frame:,} visual tokens a clip, "
        f"{cfg.trainer.eval_samples} held-out questions of {len(needles['chance'])} kinds on real clips that training "
        f"never saw, chance {100 * chance:.1f} %. Light finetuning: {cfg.trainer.max_steps} steps of "
        f"{cfg.trainer.global_batch_size} clips, learning rate {cfg.optim.lr:g}, vision tower frozen. "
        f"Device: {machine['device']}; {versions}."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
