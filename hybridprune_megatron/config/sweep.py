"""Many runs from one command line: ``reduction.budget=0.5,0.25 optim.lr=1e-4,3e-4`` are four, in Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched, product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.compose import checked_config
from hybridprune_megatron.config.schema import Config

#: What asks for a sweep on a command line, as Hydra spells it.
OPTIONS = ("-m", "--multirun")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class SweepRun:
    """One of the runs.

    Attributes:
        name: of its folder, from the values that are swept.
        overrides: its whole command line.
        cfg: what they compose, checked.
    """

    name: str
    overrides: tuple[str, ...]
    cfg: Config


def sweep_runs(overrides: Sequence[str]) -> list[SweepRun]:
    """All combinations of the values that a command line lists, the last key changing fastest.

    Every run writes to a folder of its own in the ``output_dir`` of the first.

    Args:
        overrides: without the option.

    Raises:
        ConfigError: nothing is swept, or a combination is wrong.
    """
    parsed = [_parsed(override) for override in overrides]
    swept = [override for override in parsed if override.is_sweep_override()]
    if not swept:
        raise ConfigError(
            "-m without a key of several values: give one a list, e.g. reduction.budget=0.5,0.25, or leave -m out"
        )
    combinations = list(product(*map(_values, swept)))
    fixed = [text for text, override in zip(overrides, parsed) if not override.is_sweep_override()]
    base = checked_config([*fixed, *_assigned(swept, combinations[0])]).output_dir
    runs = []
    for number, values in enumerate(combinations):
        name = run_name([override.key_or_group for override in swept], values, number)
        own = (*fixed, *_assigned(swept, values), f"output_dir='{Path(base) / name}'")
        runs.append(SweepRun(name, own, checked_config(own, need_files=True)))
    return runs


def run_name(keys: Sequence[str], values: Sequence[str], number: int) -> str:
    """A folder's name, e.g. "reduction.budget_0.5__optim.lr_0.0001"; a number where that would be too long."""
    parts = (re.sub(r"[^\w.+-]+", "_", part).strip("_") for pair in zip(keys, values) for part in pair)
    name = "__".join("_".join(pair) for pair in batched(parts, 2))
    return name if len(name) <= _LONGEST_NAME else f"run_{number:03d}"


def chosen(runs: Sequence[SweepRun], task: int) -> SweepRun:
    """The run of one task of a Slurm array.

    Raises:
        ConfigError: there are fewer runs.
    """
    if not 0 <= task < len(runs):
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID={task}: this sweep has {len(runs)} runs; submit it with --array=0-{len(runs) - 1}"
        )
    return runs[task]


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override}: cannot be read ({' '.join(str(error).split())})") from error


def _values(override: Override) -> list[str]:
    try:
        return list(override.sweep_string_iterator())
    except (HydraException, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"{override.input_line}: cannot be swept; list its values, e.g. key=1,2,3") from error


def _assigned(swept: Sequence[Override], values: Sequence[str]) -> list[str]:
    return [f"{override.get_key_element()}={value}" for override, value in zip(swept, values)]
