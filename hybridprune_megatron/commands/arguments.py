"""One way to write options, for every command: ``key=value``, or ``--key value`` as other programs have it.

What a command takes is a dataclass: its fields are the keys, its ``Attributes`` section is the help, its checks are the
errors. Where a configuration is meant, every other ``key=value`` is a Hydra override of it.
"""

from __future__ import annotations

import math
import sys
import textwrap
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hybridprune_megatron.checks import ConfigError, closest, fail
from hybridprune_megatron.config.fields import field_help

EXIT_CODE = 2
_WIDTH, _COLUMN = 110, 36
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")

S = TypeVar("S")


def parse(settings: type[S], argv: Sequence[str], usage: str, overrides: bool = False) -> tuple[S, list[str]]:
    """Settings from a command line; ``--help`` prints them and ends the process.

    Args:
        settings: a dataclass. Fields named in its ``positional`` may be given as bare words, in that order.
        argv: arguments without the program's name.
        usage: text above the keys in ``--help``.
        overrides: whether every other ``key=value`` belongs to a configuration.

    Returns:
        The settings, and the overrides.

    Raises:
        ConfigError: one line on an unknown option, a missing or wrong value.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(settings, usage, overrides))
        sys.exit(0)
    known, hints = {field.name: field for field in fields(settings)}, get_type_hints(settings)  # type: ignore[arg-type]
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    words: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        key = name.replace("-", "_") if argument.startswith("--") else name
        if argument.startswith("--"):
            if key not in known:
                raise _unknown(argument, key, known)
            given[key] = [value] if equals else _values(waiting, hints[key], argument)
        elif equals and key in known:
            given[key] = [value]
        elif equals and overrides:
            rest.append(argument)
        elif equals or argument.startswith("-"):
            raise _unknown(argument, key, known)
        else:
            words.append(argument)
    for key, word in zip((each for each in getattr(settings, "positional", ()) if each not in given), words):
        given[key] = [word]
        words = words[1:]
    if words:
        raise ConfigError(f"{words[0]}: is not an option; write key=value (--help lists the keys)")
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise fail(name, None, "must be set", f"give {name}=...")
    return settings(**{name: _converted(values, hints[name], name) for name, values in given.items()}), rest


def help_text(settings: type, usage: str, overrides: bool) -> str:
    """The usage, and a line on every key with its default."""
    lines = [usage.strip(), "", "Keys (key=value or --key value):"]
    for field in fields(settings):
        start = f"  {field.name}={_shown(field)}"
        text = field_help(settings, field.name)
        if len(start) >= _COLUMN:
            lines.append(start)
            start = ""
        lines += textwrap.wrap(f"{start:<{_COLUMN}}{text}", _WIDTH, subsequent_indent=" " * _COLUMN)
    if overrides:
        lines += ["", "Every other key=value changes the configuration: `hybridprune finetune --help` lists its keys."]
    return "\n".join(lines)


def refuse(error: BaseException | str) -> NoReturn:
    """Ends the process with code 2 and one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def _values(waiting: list[str], hint: Any, option: str) -> list[str]:
    """What follows an option: nothing for a switch, several words for a list, else one."""
    kind = _without_none(hint)
    if kind is bool:
        return ["true"]
    taken = []
    while waiting and not waiting[0].startswith("--") and (not taken or get_origin(kind) is not None):
        if get_origin(kind) is not None and "=" in waiting[0]:
            break
        taken.append(waiting.pop(0))
    if not taken:
        raise ConfigError(f"{option}: needs a value; write {option} VALUE")
    return taken


def _converted(values: list[str], hint: Any, name: str) -> Any:
    kind = _without_none(hint)
    if values == ["null"] and kind is not hint:
        return None
    if get_origin(kind) in (tuple, list):
        inner = get_args(kind)[0]
        parts = [part.strip() for value in values for part in value.strip("[]()").split(",")]
        return get_origin(kind)(_single(part, inner, name) for part in parts if part)
    return _single(values[-1], kind, name)


def _single(value: str, kind: type, name: str) -> Any:
    try:
        if kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[value.lower()]
        if kind in (str, Path) and not value.strip():
            raise ValueError
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (KeyError, ValueError):
        raise fail(name, value or "''", f"must be {_WORDS.get(kind, 'a value')}", f"set {name} to one") from None


def _unknown(argument: str, key: str, known: dict[str, Field]) -> ConfigError:
    nearest = closest(key, known)
    fix = f"did you mean {nearest}=?" if nearest else "--help lists the keys"
    return ConfigError(f"{argument}: unknown option; {fix}")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _shown(field: Field) -> str:
    if field.default is MISSING:
        return "" if field.default_factory is MISSING else str(field.default_factory())
    return "null" if field.default is None else str(field.default).lower() if field.default in (True, False) else str(
        field.default)
