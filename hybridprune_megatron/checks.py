"""Checks of single values, each with one line that names the value, what is allowed, the key that sets it and the fix.

All take the dotted ``prefix`` of the group (``"reduction"``) and the dataclass that holds the field, so that the line
names the key as the command line spells it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run. The message is a single line."""


def fail(key: str, value: object, allowed: str, fix: str) -> ConfigError:
    """The error of a value: ``key=value: allowed; fix``."""
    shown = value if isinstance(value, str) and value else repr(value)
    return ConfigError(f"{key}={shown}: {allowed}; {fix}")


def closest(word: str, words: Iterable[str]) -> str | None:
    """The word that a typo most likely meant, None if nothing is near."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return matches[0] if matches else None


def one_of(prefix: str, owner: Any, name: str, allowed: Iterable[str]) -> None:
    """The field is one of the allowed words."""
    value, words = getattr(owner, name), list(allowed)
    if value not in words:
        nearest = closest(str(value), words)
        fix = f"did you mean {nearest}?" if nearest else f"set e.g. {prefix}.{name}={words[0]}"
        raise fail(f"{prefix}.{name}", value, f"allowed are {', '.join(words)}", fix)


def at_least(prefix: str, owner: Any, lowest: int, *names: str) -> None:
    """The fields (None where a field allows it) are ``lowest`` or more."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= lowest:
            key = f"{prefix}.{name}"
            raise fail(key, value, f"must be at least {lowest}", f"set {key} to {lowest} or more")


def above_zero(prefix: str, owner: Any, *names: str) -> None:
    """The fields are finite numbers above 0."""
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < float("inf"):
            key = f"{prefix}.{name}"
            raise fail(key, value, "must be a finite number above 0", f"set {key} to a positive number")


def within(prefix: str, owner: Any, low: float, high: float, *names: str) -> None:
    """The fields lie in [low, high]."""
    for name in names:
        value = getattr(owner, name)
        if not low <= value <= high:
            key = f"{prefix}.{name}"
            raise fail(key, value, f"must be from {low:g} to {high:g}", f"set {key} inside that range")


def divides(key: str, value: int, by_key: str, by: int) -> None:
    """``value`` is a multiple of ``by``."""
    if value % by:
        raise fail(key, value, f"must be a multiple of {by_key}={by}", f"change {key} or {by_key}")
