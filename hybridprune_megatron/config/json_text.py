"""JSON that comes from somewhere else: every way in which it can be wrong is a ``ValueError`` of one line."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

_MAX_DIGITS = 100
_BREAKS_LINES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHORT = reprlib.Repr(maxlevel=2, maxdict=3, maxlist=3, maxstring=60, maxother=60)


def read_json(path: Path, infinity: bool = False) -> Any:
    """``parse_json`` of a file.

    Raises:
        ValueError: the file cannot be read, or as ``parse_json``.
    """
    try:
        # A pipe has no end, and a device neither.
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        return parse_json(path.read_bytes(), infinity)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read ({reason})") from None


def parse_json(text: bytes | str, infinity: bool = False) -> Any:
    """Parses JSON strictly: UTF-8 (a byte order mark is skipped), finite numbers, text that can be encoded again.

    Args:
        infinity: also take Infinity and -Infinity, which transformers before version 5 writes into config.json.

    Raises:
        ValueError: with the reason. Nesting that is too deep, numbers that are too long and lone surrogates are
            reasons like any other, not the ``RecursionError`` or ``UnicodeEncodeError`` they become later.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text, parse_float=_finite, parse_int=_whole, parse_constant=_infinite if infinity else _refuse_constant
        )
        # Python takes "\ud800" and fails where the text is written or tokenized.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate, {error.object[error.start]!a}, which is not a character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def short(value: Any) -> str:
    """A value of foreign JSON for a message: one line, cut, whatever its size and depth."""
    return _SHORT.repr(value)


def texts(value: Any) -> Iterator[str]:
    """All texts in nested plain values, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        if isinstance(value, dict):
            yield from value
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def is_plain(text: str) -> bool:
    """Whether a foreign name can stand in a line of a log: no control characters, line ends or halves of characters."""
    return _BREAKS_LINES.search(text) is None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is too large a number")
    return number


def _whole(text: str) -> int:
    # Python's own refusal tells how to lift its limit.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _infinite(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
