"""Overrides of the parts of ``reduction`` that are chosen by name: what Hydra is given for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hybridprune_megatron.config.reduction_schema import PARTS


def part_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that Hydra takes, from those that a user writes.

    ``reduction.score=random`` or ``reduction.score={name: random, seed: 3}`` replaces the part, where Hydra would merge
    a mapping into what the files say: it becomes a text, which ``Registry.build`` reads. ``reduction.score.seed=3``
    then sets a key of it; alone, it changes a key of the part that the files chose, which they may not name (``++``).
    """
    result = list(overrides)
    for part in PARTS:
        key = f"reduction.{part}"
        own = [each for each in result if each.startswith((f"{key}=", f"{key}.")) and "=" in each]
        chosen: dict[str, Any] = {}
        for override in own:
            name, value = _parsed(override)
            if name == key:
                chosen = value if isinstance(value, dict) else {"name": value}
            elif chosen and name is not None:
                chosen[name[len(key) + 1 :]] = value
        if isinstance(chosen.get("name"), str) and set(chosen) != {"name"}:
            result = [each for each in result if each not in own]
            result.append(f"{key}='{json.dumps(chosen)}'")
        else:
            result = [f"++{each}" if each in own and each.startswith(f"{key}.") else each for each in result]
    return result


def import_named(overrides: Sequence[str]) -> None:
    """Imports the scores that a command line names by their dotted paths, which a stored file may name after that.

    Raises:
        ConfigError: one cannot be imported.
    """
    for override in overrides:
        name, value = _parsed(override)
        chosen = value.get("name") if isinstance(value, dict) else value
        for part, registry in PARTS.items():
            if name == f"reduction.{part}" and isinstance(chosen, str):
                registry.find(chosen)


def _parsed(override: str) -> tuple[str | None, Any]:
    """Key and value of an override; None where it cannot be read, which is said later."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return None, None
    return parsed.key_or_group, parsed.value()
