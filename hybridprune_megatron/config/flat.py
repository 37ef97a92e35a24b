"""A configuration as one flat table of dotted keys, to be compared with another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any


def config_values(cfg: Any) -> dict[str, Any]:
    """Every value of a configuration (a dataclass) by its dotted key, as it reads back from JSON."""
    return dict(leaves(json.loads(json.dumps(asdict(cfg)))))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested dicts that is no dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
