"""Overrides of the parts of ``reduction`` that are chosen by name: what Hydra is given for them."""

from __future__ import annotations

from collections.abc import Sequence

from hybridprune_megatron.config.reduction_schema import PARTS


def part_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that Hydra takes, from those that a user writes.

    ``reduction.score.seed=3`` sets a key that the composed file may not name, which Hydra wants to be told (``++``).
    ``reduction.score=random reduction.score.seed=3`` replaces the part and sets a key of the new one: one text, which
    ``Registry.build`` reads.
    """
    result = list(overrides)
    for part in PARTS:
        key = f"reduction.{part}"
        chosen = [each for each in result if each.startswith(f"{key}=") and "{" not in each]
        keys = [each for each in result if each.startswith(f"{key}.") and "=" in each]
        if chosen and keys:
            values = (each[len(key) + 1 :].split("=", 1) for each in keys)
            name = chosen[-1].partition("=")[2]
            text = "{name: " + name + "".join(f", {inner}: {value}" for inner, value in values) + "}"
            result = [each for each in result if each not in (*chosen, *keys)] + [f"{key}='{text}'"]
        else:
            result = [f"++{each}" if each in keys else each for each in result]
    return result
