"""Counts what a prefill costs, layer by layer, and finds the budget that reaches a speedup or fits a memory.

    hybridprune plan experiment=nemotron_nano_12b_v2_vl target.speedup=4
    hybridprune plan experiment=nemotron_nano_12b_v2_vl target.memory_gib=34
    hybridprune plan experiment=demo reduction=random        # no target: the configured budget
    hybridprune plan experiment=twin target.visual_tokens=8192 --measure runs/twin.json

The last line is the override to paste after hybridprune finetune. docs/analysis.md says what is counted.

  --plot FILE.png      draws retention and operations by layer
  --measure FILE.json  times pieces of a prefill here at other lengths, predicts the prefill from them, and times it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config import Config, ConfigError, load_config
from hybridprune_megatron.config.fields import field_help
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_file
from hybridprune_megatron.cost.calibration import Calibration, calibration_lengths, predict, sample_sizes
from hybridprune_megatron.cost.plan import Plan, make_plan
from hybridprune_megatron.cost.report import plan_lines
from hybridprune_megatron.cost.target import PREFIX, TargetConfig, read_target, split_target

COMMAND = "recipes/plan.py"
OPTIONS = ("--plot", "--measure")


def usage() -> str:
    """What the command takes."""
    keys = []
    for field in fields(TargetConfig):
        value = "null" if field.default is None else field.default
        keys.append(f"  {f'{PREFIX}{field.name}={value}':<36}{field_help(TargetConfig, field.name)}")
    return "\n".join([__doc__ or "", *keys, "", "Every key of hybridprune finetune may be set too (its --help)."])


def split_options(arguments: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The files of ``--plot`` and ``--measure``, and all other arguments.

    Raises:
        ConfigError: an unknown option, or one without its file.
    """
    options: dict[str, Path] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            others.append(argument)
            continue
        name, _, value = argument.partition("=")
        if name not in OPTIONS:
            raise ConfigError(f"{argument}: unknown option; allowed are --help, {', '.join(OPTIONS)} and overrides")
        value = value or next(rest, "")
        if not value or value.startswith("-") or "=" in value:
            raise ConfigError(f"{name}: needs the file to write; give e.g. {name} runs/plan{name.replace('--', '_')}")
        options[name] = Path(value)
    return options, others


def measure(cfg: Config, plan: Plan, rounds: int = 7) -> dict[str, Any]:
    """Predicts the prefill of a plan from pieces timed at other lengths, and times it.

    Args:
        cfg: a model small enough for this machine; weights are random.
        plan: its prompt and budget.
        rounds: how often the prefill and its long pieces are timed.

    Returns:
        What was measured and predicted, for JSON. The fastest of the rounds counts: other work on the machine adds.
    """
    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel, shut_down

    device = init_distributed(Launch(0, 1, 0, 1))
    init_model_parallel(seed=cfg.trainer.seed)
    from hybridprune_megatron.evaluation.language_prefill import Prompt, one_sample, time_pieces, time_prefill
    from hybridprune_megatron.evaluation.machine import describe_machine
    from hybridprune_megatron.models.build import build_model

    model, prompt = build_model(cfg).to(device), plan.prefill.prompt
    reduction = cfg.reduction.policy(
        cfg.model.hybrid_pattern, retention=tuple(row.retention for row in plan.prefill.rows)
    )
    if reduction is None:
        raise fail("reduction.budget", plan.budget, "--measure compares with a reduction", "set it below 1")
    pieces: dict[str, dict[int, float]] = {}
    for tokens in calibration_lengths(prompt.tokens):
        sample = one_sample(*sample_sizes(tokens, prompt.text, prompt.question))
        # Short ones cost little, and a moment of other work shows in them more.
        often = max(rounds, min(10 * rounds, rounds * prompt.tokens // tokens))
        for name, taken in time_pieces(model, cfg.model.hybrid_pattern, sample, reduction, often).items():
            pieces.setdefault(name, {})[tokens] = taken
    predicted = predict(plan.prefill, Calibration(pieces))
    whole = Prompt.of(model, one_sample(prompt.visual, prompt.text, prompt.question))
    seconds = time_prefill(model, whole, {"full": None, "reduced": reduction}, rounds)
    shut_down()
    fastest = {name: min(each) for name, each in seconds.items()}
    ratio = fastest["full"] / fastest["reduced"]
    return {
        "model": cfg.model.name,
        "prompt": vars(prompt),
        "budget": plan.budget,
        "machine": describe_machine(),
        "seconds_by_piece_and_tokens": pieces,
        "predicted": {**vars(predicted), "ratio": predicted.ratio},
        "measured": {**fastest, "ratio": ratio, "rounds": seconds},
        "operations_ratio": plan.prefill.speedup,
        "predicted_over_measured": predicted.ratio / ratio,
    }


def show_measured(result: dict[str, Any]) -> None:
    """Prints predictions next to measurements."""
    for kind in ("predicted", "measured"):
        found = result[kind]
        print(f"{kind:<10} full {found['full']:.3f} s, reduced {found['reduced']:.3f} s, ratio {found['ratio']:.3f}")
    share = result["predicted"]["scoring"] / result["predicted"]["reduced"]
    print(
        f"predicted ratio over measured: {result['predicted_over_measured']:.3f}; by operations alone "
        f"{result['operations_ratio']:.3f}; scoring and dropping {share:.1%} of the reduced time"
    )


@one_line_errors("plan")
def main(arguments: Sequence[str]) -> None:
    """Prints a plan, or one line on stderr with exit code 2."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return
    options, arguments = split_options(arguments)
    mine, others = split_target(arguments)
    target, cfg = read_target(mine), load_config(others)
    if "--measure" in options and cfg.parallel.model_parallel_size > 1:
        raise ConfigError("--measure: runs in one process; set parallel=single")
    if "--measure" in options and cfg.reduction.front.name != "none":
        reason = "--measure times the language model alone"
        raise fail("reduction.front", cfg.reduction.front.name, reason, "set reduction.front=none")
    for name, path in options.items():
        check_file(path, COMMAND, name)
    plan = make_plan(cfg, target)
    print("\n".join(plan_lines(cfg, target, plan)), flush=True)
    if "--plot" in options:
        from hybridprune_megatron.cost.plot import plot_plan

        plot_plan(options["--plot"], plan.prefill, cfg.model.name)
    if "--measure" in options:
        result = measure(cfg, plan)
        options["--measure"].parent.mkdir(parents=True, exist_ok=True)
        options["--measure"].write_text(json.dumps({"made_by": COMMAND, **result}, indent=1) + "\n")
        show_measured(result)
