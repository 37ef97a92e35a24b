"""Runs on a GPU what no CPU could show, step by step in order of worth; for scripts/gpu_day_one.sh.

Each step has a time limit of its own, a step that fails does not keep the next from running, and what is known is
written after every step, so that it survives whatever ends the rest. docs/gpu.md says what the steps look for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "gpu_day_one"
PAGES = ROOT / "docs" / "performance"
#: Of the whole command on a GPU and in a rehearsal, and what is left of it for the last lines.
MINUTES, REHEARSAL_MINUTES, SPARE_SECONDS = 12.0, 9.5, 10.0
#: Seconds after SIGTERM in which a step may still write what it has.
_GRACE = 5.0
#: One layer pattern of the 12B model with two attention layers, at its full widths.
SLICE = [
    *("experiment=nemotron_nano_12b_v2_vl", "parallel=single", "trainer.num_nodes=1", "trainer.devices=1"),
    *("trainer.recompute=none", "model.hybrid_pattern=M-M-M-M*-M-M-M-M*-", "reduction.budget=0.25"),
]


@dataclass(frozen=True)
class Command:
    """One program of a step.

    Attributes:
        arguments: of Python, or a whole command line with ``program``.
        program: what runs instead of Python; the step says so where it is not there.
        checks: it is a program of ``tests.programs``: its folder comes after the module's name, and what failed is in
            ``results.json`` there.
        report: a JSON file in that folder whose content is a figure.
    """

    arguments: tuple[str, ...]
    program: str = ""
    checks: bool = False
    report: str = ""


@dataclass(frozen=True)
class Step:
    """A row of the table.

    Attributes:
        name: what it looks at.
        seconds: that it may take.
        on_gpu: its programs.
        on_cpu: those of a rehearsal; none: it needs a GPU.
    """

    name: str
    seconds: float
    on_gpu: tuple[Command, ...]
    on_cpu: tuple[Command, ...] = ()


@dataclass
class Result:
    """What came of a step.

    Attributes:
        status: passed, failed, skipped or out of time.
        said: the reason, one line.
        figures: by the program that measured them.
    """

    number: int
    name: str
    status: str
    seconds: float
    said: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


_VERSIONS = (Command(("-m", "scripts.gpu_versions"), report="versions.json"),)
_GATHER = "tests/kernels/test_select_and_gather.py"
STEPS: tuple[Step, ...] = (
    Step("versions", 30, _VERSIONS, _VERSIONS),
    Step(
        "native operators",
        100,
        (
            Command(_pytest("-m", "gpu", "tests/kernels")),
            Command(("--error-exitcode=9", "PYTHON", *_pytest("-m", "gpu", _GATHER)), program="compute-sanitizer"),
        ),
        (Command(_pytest("-m", "not gpu", _GATHER, "-k", "cpu")),),
    ),
    Step(
        "Mamba kernels against ops/",
        90,
        (Command(("-m", "tests.gpu.mamba_kernels"), checks=True),),
        # In Triton's interpreter, which takes its time.
        (Command(("-m", "tests.models.real_mamba", "FOLDER", "the_gated_norm_is_ours"), checks=True),),
    ),
    Step(
        "attention in bf16, no wait for the device",
        60,
        (Command(("-m", "tests.gpu.hot_path"), checks=True),),
        (Command(("-m", "tests.gpu.hot_path"), checks=True),),
    ),
    Step(
        "both layer sets agree, FP8",
        120,
        (Command(("-m", "tests.gpu.layer_sets"), checks=True),),
        (Command(("-m", "tests.models.te_path", "FOLDER", "settings_of_a_recipe"), checks=True),),
    ),
    Step(
        "training, stopped and resumed",
        150,
        (Command(("-m", "scripts.gpu_resume"), report="resume.json"),),
        (Command(("-m", "scripts.gpu_resume"), report="resume.json"),),
    ),
    Step(
        "speed",
        150,
        (
            Command(
                ("kernels/bench.py", "--device", "cuda", "--quick", "--out", "FOLDER/kernels.json"),
                report="kernels.json",
            ),
            Command(
                (
                    *("recipes/benchmark.py", *SLICE, "--visual-tokens", "16384", "32768", "--rounds", "3"),
                    *("--no-peer", "--no-train", "--no-decode", "--out", "FOLDER"),
                ),
                report="report.json",
            ),
        ),
        (
            Command(
                ("kernels/bench.py", "--quick", "--lengths", "256", "--out", "FOLDER/kernels.json"),
                report="kernels.json",
            ),
            Command(
                (
                    *("recipes/benchmark.py", "--visual-tokens", "256", "--rounds", "1", "--no-peer", "--no-train"),
                    *("--no-decode", "--out", "FOLDER"),
                ),
                report="report.json",
            ),
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps; 1 where one failed or ran out of time."""
    parser = argparse.ArgumentParser(prog="gpu_day_one.sh", description=__doc__, epilog="prepare: see prepare --help")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, every step that can")
    parser.add_argument("--steps", type=int, nargs="+", choices=range(len(STEPS)), help="only these, in this order")
    parser.add_argument(
        "--minutes", type=float, help=f"of all steps together (default {MINUTES:g}, rehearsal {REHEARSAL_MINUTES:g})"
    )
    parser.add_argument("--patience", type=float, default=1.0, help="times every step's own limit (default 1)")
    parser.add_argument("--out", type=Path, help="the report (default docs/performance/<device>.json)")
    options = parser.parse_args(argv)
    # Or a step that is under way would outlive this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    numbers = options.steps or range(len(STEPS))
    minutes = options.minutes or (REHEARSAL_MINUTES if options.rehearse else MINUTES)
    deadline = time.monotonic() + 60 * minutes - SPARE_SECONDS
    report: dict[str, Any] = {
        "command": " ".join(["scripts/gpu_day_one.sh", *(sys.argv[1:] if argv is None else argv)]),
        "rehearsal": options.rehearse,
        "date": time.strftime("%Y-%m-%d"),
        "device": "unknown",
        "versions": {},
        "steps": [],
    }
    results: list[Result] = []
    for number in numbers:
        step = STEPS[number]
        left = deadline - time.monotonic()
        print(f"{number}. {step.name}", flush=True)
        results.append(run_step(number, step, options.rehearse, min(options.patience * step.seconds, left), WORK))
        found = results[-1].figures.get("versions", {})
        report |= {name: found[name] for name in ("device", "versions") if name in found}
        report["steps"] = [asdict(result) for result in results]
        out = options.out or default_out(report)
        write(out, report)
    print(f"\n{table(results)}\n\n{out}")
    return int(any(result.status in ("failed", "out of time") for result in results))


def default_out(report: dict[str, Any]) -> Path:
    """Where a report goes: a rehearsal, and one whose device is not known, to the runs."""
    if report["rehearsal"] or report["device"] == "unknown":
        return WORK / ("rehearsal.json" if report["rehearsal"] else "report.json")
    return PAGES / f"{slug(report['device'])}.json"


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia")).strip("_") or "unknown"


def run_step(number: int, step: Step, rehearse: bool, seconds: float, work: Path) -> Result:
    """All programs of a step, one after another, within its seconds; the next one runs after a failure too."""
    commands = step.on_cpu if rehearse else step.on_gpu
    if not commands:
        return Result(number, step.name, "skipped", 0.0, "needs a GPU")
    start, worst = time.monotonic(), "passed"
    said: list[str] = []
    figures: dict[str, Any] = {}
    for place, command in enumerate(commands):
        folder = work / f"step_{number}_{place}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        status, line = run_command(command, folder, seconds - (time.monotonic() - start))
        figures |= figures_of(command, folder)
        said += [line] if line else []
        worst = max(worst, status, key=_SEVERITY.index)
    return Result(number, step.name, worst, round(time.monotonic() - start, 1), "; ".join(said), figures)


#: From good to bad.
_SEVERITY = ["passed", "skipped", "out of time", "failed"]


def run_command(command: Command, folder: Path, seconds: float) -> tuple[str, str]:
    """Status of one program, and a line where it did not pass; its output is in ``folder/log``."""
    program = command.program or sys.executable
    if command.program and shutil.which(command.program) is None:
        return "passed", f"{command.program} is not on the PATH: left out"
    if seconds <= 0:
        return "out of time", f"{' '.join(command.arguments[:3])}: no time was left"
    arguments = [each.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable) for each in command.arguments]
    if "FOLDER" not in " ".join(command.arguments) and (command.checks or command.report):
        arguments.append(str(folder))
    environment = {"MAMBA_DETERMINISTIC": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            [program, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "out of time", f"{' '.join(command.arguments[:3])}: stopped after {seconds:.0f} s"
    failed = failed_checks(folder / "results.json") if command.checks else []
    if code == 0 and not failed:
        return "passed", ""
    return "failed", "; ".join(failed) or f"{' '.join(command.arguments[:3])}: {last_line(log)} (status {code})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and all that it has started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_GRACE)
    # What ignores the first signal, or has lost its parent.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed_checks(path: Path) -> list[str]:
    """Of a program of ``tests.programs``: names of what failed, each with the last line of its traceback."""
    if not path.is_file():
        return []
    results = json.loads(path.read_text())
    return [f"{name}: {text.strip().splitlines()[-1]}" for name, text in results.items() if text]


def last_line(log: Path) -> str:
    """The last line of a log that says something, cut to a row's length."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def figures_of(command: Command, folder: Path) -> dict[str, Any]:
    """What a program has measured, by the name of its report; what is not there or not whole is left out."""
    path = folder / command.report
    try:
        return {path.stem: json.loads(path.read_text())} if command.report else {}
    except (OSError, ValueError):
        return {}


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes a report in one move, so that there is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")
    part.replace(path)


def table(results: Sequence[Result]) -> str:
    """For a terminal."""
    rows = [("", "step", "result", "seconds", ""), *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    shown: Callable[[tuple[str, ...]], str] = lambda row: "  ".join(  # noqa: E731
        [cell.ljust(width) for cell, width in zip(row, widths)] + [row[4]]
    ).rstrip()
    return "\n".join(map(shown, rows))


def _cells(result: Result) -> tuple[str, ...]:
    return (str(result.number), result.name, result.status, f"{result.seconds:.1f}", result.said)


if __name__ == "__main__":
    raise SystemExit(main())
