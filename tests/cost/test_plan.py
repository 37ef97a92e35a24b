"""The planner: targets met on the shipped models, the arithmetic of the method's notes, errors, and time."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hybridprune_megatron.config import ConfigError, load_config
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.cost.memory import GIB
from hybridprune_megatron.cost.plan import GRID, largest_budget, make_plan, smallest_budget
from hybridprune_megatron.cost.prefill import Prompt, prefill_cost
from hybridprune_megatron.cost.target import read_target
from recipes.plan import main
from tests.own_time import run_timed

RECIPE = CONF_DIR.parent / "recipes" / "plan.py"
REAL = ("nemotron_nano_12b_v2_vl", "nemotron_nano_9b_v2", "nemotron_h_8b")
HEAVY = ("torch", "megatron", "nemo", "lightning", "transformers", "numpy")


def _plan(experiment: str, *overrides: str, **target: object):
    cfg = load_config([f"experiment={experiment}", *overrides])
    return cfg, make_plan(cfg, read_target([f"target.{key}={value}" for key, value in target.items()]))


@pytest.mark.parametrize("experiment", REAL)
@pytest.mark.parametrize("speedup", [1.5, 3.0, 6.0])
def test_speedups_are_met(experiment: str, speedup: float):
    cfg, plan = _plan(experiment, speedup=speedup)
    # From the override alone, as a run would read it.
    retention = cfg.retention_at(float(f"{plan.budget:g}"))
    again = prefill_cost(cfg.model, cfg.reduction, retention, plan.prefill.prompt, cfg.trainer.precision)
    ratio = again.full.flops / again.reduced.flops
    assert speedup <= ratio < 1.02 * speedup
    assert sum(retention) / len(retention) == pytest.approx(plan.budget, abs=1e-6)
    # The next budget of the grid misses it: this is the largest.
    missed = cfg.retention_at(plan.budget + 1 / GRID)
    assert prefill_cost(cfg.model, cfg.reduction, missed, plan.prefill.prompt, "bf16").speedup < speedup


def test_the_speedup_of_all_parts_counts_the_tower():
    _, plan = _plan("nemotron_nano_12b_v2_vl", speedup=2, parts="all")
    prefill = plan.prefill
    assert 2 <= (prefill.full + prefill.before).flops / (prefill.reduced + prefill.before).flops < 2.04
    assert prefill.before.flops > 0.1 * prefill.full.flops


def test_memory_is_met():
    _, without = _plan("nemotron_nano_12b_v2_vl", visual_tokens=32768, speedup=1.01)
    full = without.memory["training"][0].total / GIB
    _, plan = _plan("nemotron_nano_12b_v2_vl", visual_tokens=32768, memory_gib=full - 3)
    assert 0.98 * (full - 3) < plan.memory["training"][1].total / GIB <= full - 3
    # Both targets: the smaller budget of the two.
    _, both = _plan("nemotron_nano_12b_v2_vl", visual_tokens=32768, memory_gib=full - 3, speedup=6)
    assert both.budget == min(plan.budget, _plan("nemotron_nano_12b_v2_vl", visual_tokens=32768, speedup=6)[1].budget)


@pytest.mark.parametrize(
    ("experiment", "visual", "low", "high"),
    [
        # What the method's notes give for 200 text tokens and a sigmoid of mean 0.25; within 1 % for these two curves.
        ("nemotron_nano_12b_v2_vl", 8192, 3.77, 3.77),
        ("nemotron_nano_12b_v2_vl", 32768, 4.05, 4.12),
        ("nemotron_nano_12b_v2_vl", 131072, 4.4, 4.7),
        ("twin", 8192, 4.65, 4.78),
    ],
)
@pytest.mark.parametrize("curve", [(0.2, 10), (0.1, 8)])
def test_what_arithmetic_allows(experiment: str, visual: int, low: float, high: float, curve: tuple[float, float]):
    cfg = load_config([f"experiment={experiment}"])
    reduction = replace(
        cfg.reduction, budget=0.25, schedule={"name": "sigmoid", "midpoint": curve[0], "slope": curve[1], "floor": None}
    )
    cfg.reduction = reduction
    prefill = prefill_cost(cfg.model, reduction, cfg.retention_by_layer, Prompt(visual, 200, 30), "bf16")
    assert 0.99 * low < prefill.speedup < 1.01 * high


def test_kept_tokens_and_shares_add_up():
    cfg, plan = _plan("demo", frames=16)
    rows = plan.prefill.rows
    assert plan.prefill.prompt == Prompt(256, 200 + 16 * 16, 30, 16)
    assert sum(row.visual for row in rows) / (10 * 256) == pytest.approx(0.25, abs=2e-3)
    assert [row.retention for row in rows] == list(cfg.retention_by_layer)
    reduced = sum(cost.flops for row in rows for cost in (*row.reduced.values(), *row.scoring.values()))
    assert plan.prefill.reduced.flops == reduced + sum(cost.flops for cost in plan.prefill.ends_reduced.values())
    # Only layers that drop pay for a score.
    assert all("score" in row.scoring or "columns" in row.scoring for row in rows if row.scoring)
    assert [bool(row.scoring) for row in rows[:-1]] == [a.visual > b.visual for a, b in pairwise(rows)]


def test_largest_budget_is_what_trying_all_finds():
    draw = random.Random(0)
    for _ in range(200):
        exists, reached = draw.randint(1, GRID), draw.randint(0, GRID + 1)

        def retention_at(budget: float, exists: int = exists) -> tuple[float, ...]:
            if round(budget * GRID) < exists:
                raise ValueError
            return ()

        def reaches(budget: float, reached: int = reached) -> bool:
            return round(budget * GRID) <= reached

        steps = [step for step in range(exists, GRID + 1) if step <= reached]
        assert largest_budget(retention_at, reaches) == (max(steps) / GRID if steps else None)
        assert smallest_budget(retention_at) == exists / GRID


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["target.speedup=40"], "target.speedup=40: the best that this schedule reaches is 13."),
        (["target.memory_gib=20"], "target.memory_gib=20: the least that this schedule needs is "),
        (["target.speedup=1"], "target.speedup=1.0: must be a finite number above 1; set e.g. target.speedup=4"),
        (["target.sped=4"], "target.sped=4: unknown key; target has speedup, "),
        (["target.speedup=fast"], "target.speedup=fast: must be a number; set e.g. target.speedup=4"),
        (["target.frames=0"], "target.frames=0: must be at least 1"),
        (["target.frames=8", "target.visual_tokens=8"], "target.visual_tokens=8: target.frames is set too"),
        (["target.question_tokens=300"], "target.question_tokens=300: must not exceed target.text_tokens=200"),
        (["target.memory_gib=99", "target.frames=600"], "target.memory_gib: a sample of 163400 tokens does not fit"),
        (["target.device=h1000"], "target.device=h1000: allowed are a100, h100, h200; did you mean h100?"),
        (["--measrue", "x"], "--measrue: unknown option; allowed are --help, --plot, --measure"),
        (["--plot"], "--plot: needs the file to write"),
        (["reduction.budgt=1"], "reduction.budgt=1: unknown key"),
    ],
)
def test_errors_are_one_line(arguments: list[str], line: str, capsys):
    with pytest.raises(SystemExit) as end:
        main(["experiment=nemotron_nano_12b_v2_vl", *arguments])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.removeprefix("hybridprune plan: ").startswith(line)


def test_a_list_of_shares_has_no_budget_to_solve_for():
    shares = [1.0, 0.5, 0.5, 0.25, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    overrides = [f"reduction.schedule={{name: listed, retention: {shares}}}", "reduction.budget=0.265"]
    with pytest.raises(ConfigError, match=r"^reduction.schedule=listed: a list of shares has no budget to solve for"):
        _plan("demo", *overrides, speedup=2)
    _, plan = _plan("demo", *overrides)
    assert [row.retention for row in plan.prefill.rows] == shares


def test_frames_need_a_tower():
    with pytest.raises(ConfigError, match=r"^target.frames=8: model nemotron_h_8b has no vision tower"):
        _plan("nemotron_h_8b", frames=8)
    assert _plan("nemotron_h_8b")[1].prefill.prompt == Prompt(7992, 200, 30)


def test_help_explains_every_key(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for key in vars(read_target([])):
        line = next(line for line in shown.splitlines() if line.strip().startswith(f"target.{key}="))
        assert len(line.split(maxsplit=1)) == 2, f"{key} has no line in the Attributes section"


@pytest.mark.parametrize("experiment", REAL)
def test_a_plan_takes_less_than_five_seconds_and_imports_nothing_heavy(experiment: str, tmp_path: Path):
    code = (
        "import runpy, sys\n"
        "recipe, heavy = sys.argv[1], sys.argv[3].split(',')\n"
        "sys.argv = [recipe, sys.argv[2], 'target.speedup=4']\n"
        "runpy.run_path(recipe, run_name='__main__')\n"
        "assert not {name.partition('.')[0] for name in sys.modules} & set(heavy)"
    )
    command = [sys.executable, "-c", code, str(RECIPE), f"experiment={experiment}", ",".join(HEAVY)]
    done, seconds = run_timed(command, tmp_path, limit_s=5)
    assert done.returncode == 0, done.stderr
    assert seconds < 5
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("reduction.budget=0.")
    assert any(line.startswith("target.speedup=4: 4.0") for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_stops_reading_ends_it_quietly():
    command = [sys.executable, str(RECIPE), "experiment=twin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""


def test_the_picture_is_written(tmp_path: Path, capsys):
    main(["experiment=demo", "--plot", str(tmp_path / "new" / "plan.png")])
    assert capsys.readouterr().out.splitlines()[-1] == "reduction.budget=0.25"
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")
