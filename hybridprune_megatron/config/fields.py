"""Looks into the schema: keys, types in words, and the line on each key from the docstrings."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hybridprune_megatron.config.schema import Config

_KIND_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def without_none(hint: Any) -> Any:
    """The type inside ``X | None``; any other type as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def is_group(hint: Any) -> bool:
    """The type holds keys of its own that the schema knows."""
    return is_dataclass(without_none(hint))


def is_passed_on(hint: Any) -> bool:
    """The type is a dictionary that another library checks."""
    return get_origin(without_none(hint)) is dict


@cache
def field_types(owner: type) -> Mapping[str, Any]:
    """Type of every field of a dataclass."""
    return types.MappingProxyType(get_type_hints(owner))


def all_keys(owner: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of the schema, groups included."""
    for name, hint in field_types(owner).items():
        yield prefix + name
        if is_group(hint):
            yield from all_keys(without_none(hint), f"{prefix}{name}.")


def leaf_keys() -> list[str]:
    """Dotted names of all keys that hold a value, not a group."""
    keys = list(all_keys())
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def type_of_key(key: str) -> Any:
    """Type of a dotted key of the schema; None if it has no such key, or another library knows it."""
    owner = _owner(key)
    return None if owner is None else field_types(owner).get(key.rpartition(".")[2])


def _owner(key: str) -> Any:
    """The dataclass that holds a dotted key; None if there is none."""
    owner: Any = Config
    for group in key.split(".")[:-1]:
        owner = without_none(field_types(owner).get(group))
        if not is_group(owner):
            return None
    return owner


def default_of(owner: Any, name: str) -> Any:
    """A field's default; None where it has none or makes it by a factory."""
    default = next(field.default for field in fields(owner) if field.name == name)
    return None if default is MISSING else default


def field_help(owner: type, name: str) -> str:
    """What the ``Attributes`` section of its dataclass, or of a base, says of a field, on one line."""
    for described in owner.__mro__:
        section = (described.__doc__ or "").partition("Attributes:")[2]
        # A line that is indented further continues the one above.
        found = re.search(rf"^( +){name}: (.+(?:\n\1 +.+)*)$", section, flags=re.MULTILINE)
        if found:
            return " ".join(found.group(2).split())
    return ""


def key_help(key: str) -> str:
    """The line on a dotted key of the schema."""
    *_, name = key.split(".")
    return field_help(_owner(key), name)


def type_words(hint: Any) -> str:
    """A type in words: "a number", "a list of numbers or null"."""
    inner = without_none(hint)
    tail = "" if inner is hint else " or null"
    if get_origin(inner) is list:
        return f"a list of {_KIND_WORDS[get_args(inner)[0]].rpartition(' ')[2]}s{tail}"
    if is_group(inner) or is_passed_on(inner):
        return f"a group of keys{tail}"
    return _KIND_WORDS.get(inner, "a value") + tail
