"""Counts what a prefill costs, layer by layer, and finds the budget that reaches a speedup or fits a memory.

    python recipes/plan.py experiment=nemotron_nano_12b_v2_vl target.speedup=4
    python recipes/plan.py experiment=nemotron_nano_12b_v2_vl target.memory_gib=60 target.frames=64
    python recipes/plan.py experiment=demo reduction=random        # no target: the configured budget

The last line is the override to paste behind recipes/finetune.py. docs/planner.md says what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from hybridprune_megatron.config import ConfigError, load_config
from hybridprune_megatron.config.compose import EXIT_CODE
from hybridprune_megatron.config.fields import field_help
from hybridprune_megatron.cost.plan import make_plan
from hybridprune_megatron.cost.report import plan_lines
from hybridprune_megatron.cost.target import PREFIX, TargetConfig, read_target, split_target


def usage() -> str:
    """What the command takes."""
    keys = [
        f"  {f'{PREFIX}{field.name}={field.default}':<36}{field_help(TargetConfig, field.name)}"
        for field in fields(TargetConfig)
    ]
    return "\n".join([__doc__ or "", *keys, "", "Every key of recipes/finetune.py may be set too (its --help)."])


def main(arguments: Sequence[str]) -> None:
    """Prints a plan, or one line on stderr with exit code 2."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return
    mine, others = split_target(arguments)
    try:
        target, cfg = read_target(mine), load_config(others)
        print("\n".join(plan_lines(cfg, target, make_plan(cfg, target))))
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main(sys.argv[1:])
