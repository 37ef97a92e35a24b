"""A configuration as one flat table of dotted keys, to be compared with another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config


def plain_config(cfg: Config) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, as JSON has it."""
    return json.loads(json.dumps(asdict(cfg) | {"reduction": cfg.reduction.plain()}))


def config_values(cfg: Config) -> dict[str, Any]:
    """Every value of a configuration by its dotted key."""
    return dict(leaves(plain_config(cfg)))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested dicts that is not a dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
