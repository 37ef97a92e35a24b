"""The error of a value: one line that names the value, what is allowed, the key that sets it and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Characters of a value that an error shows.
_MAX_SHOWN = 200


class ConfigError(ValueError):
    """A configuration that cannot run. The message is a single line."""


def fail(key: str, value: object, allowed: str, fix: str) -> ConfigError:
    """The error of a value: ``key=value: allowed; fix``."""
    return ConfigError(f"{key}={shown(value)}: {allowed}; {fix}")


def shown(value: object) -> str:
    """A value on one line of a readable length: text that prints as it is, all else as Python writes it."""
    if isinstance(value, int) and value.bit_length() > _MAX_SHOWN:
        # Python refuses to write out whole numbers of more than some thousand digits.
        return f"{'-' * (value < 0)}2^{value.bit_length()}"
    try:
        text = value if isinstance(value, str) and value.strip() and value.isprintable() else ascii(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}... ({len(text)} characters)"


def closest(word: str, words: Iterable[str]) -> str | None:
    """The word that a typo most likely meant, None if nothing is near."""
    matches = difflib.get_close_matches(word[:_MAX_SHOWN], list(words), n=1, cutoff=0.6)
    return matches[0] if matches else None


def divides(key: str, value: int, by_key: str, by: int) -> None:
    """``value`` is a multiple of ``by``."""
    if value % by:
        raise fail(key, value, f"must be a multiple of {by_key}={by}", f"change {key} or {by_key}")
