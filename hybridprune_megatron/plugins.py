"""Parts of a configuration that bring their own keys: a name chooses a class, and the class is a dataclass of its keys.

A part is written as its name, or as its name with some of its keys::

    score: random
    score: {name: random, seed: 3}
    score: my_package.my_scores.KeyNorm          # anybody's class, by its dotted path
    score: {name: key_norm, power: 3.0}          # one that an installed package announces as an entry point

Nothing slow is imported but what a chosen class of somebody else's imports.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from yaml import safe_load  # type: ignore[import-untyped]  # the package ships no types

from hybridprune_megatron.checks import ConfigError, closest, fail

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class Plugin:
    """Base of the classes that a name chooses; each is a frozen dataclass whose fields are its keys.

    Attributes:
        name: what chooses it in a configuration.
    """

    name: ClassVar[str]


P = TypeVar("P", bound=Plugin)


@dataclass(frozen=True)
class Registry(Generic[P]):
    """The classes that one key of the configuration chooses among.

    Attributes:
        key: the key, e.g. "reduction.score".
        base: what they all are.
        built_in: ours.
        group: entry points of installed packages that announce more; "": none.
    """

    key: str
    base: type[P]
    built_in: Sequence[type[P]]
    group: str = ""

    @cached_property
    def _by_name(self) -> dict[str, type[P]]:
        return {known.name: known for known in self.built_in}

    @property
    def default(self) -> str:
        """Our first."""
        return self.built_in[0].name

    @property
    def names(self) -> list[str]:
        """What may be written, dotted paths aside."""
        announced = [entry.name for entry in entry_points(group=self.group)] if self.group else []
        return sorted({*self._by_name, *announced})

    def find(self, name: str) -> type[P]:
        """The class of a name.

        Raises:
            ConfigError: there is none, it cannot be imported, or it is not of this kind.
        """
        if name in self._by_name:
            return self._by_name[name]
        announced = [entry.value.replace(":", ".") for entry in entry_points(group=self.group, name=name)]
        path = announced[0] if self.group and announced else name
        module, _, attribute = path.rpartition(".")
        if not module:
            nearest = closest(name, self.names)
            fix = f"did you mean {nearest}?" if nearest else f"set e.g. {self.key}={self.names[0]}"
            allowed = f"allowed are {', '.join(self.names)}"
            raise fail(self.key, name, f"{allowed}, or the dotted path of a class" if self.group else allowed, fix)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            reason = " ".join(str(error).split())
            fix = "give package.module.Class of something that Python can import (PYTHONPATH, or an installed package)"
            raise fail(self.key, name, f"cannot be imported ({reason})", fix) from error
        if not (isinstance(found, type) and issubclass(found, self.base) and is_dataclass(found)):
            raise fail(self.key, name, f"is not a dataclass derived from {self.base.__name__}", "derive it from that")
        # What is saved and exported must find it again.
        found.name = name
        return found

    def build(self, value: Any) -> P:
        """The object of a part of a configuration.

        Args:
            value: a name, a mapping with "name" and some of its keys, or the object itself.

        Raises:
            ConfigError: an unknown name or key, or a value that the key does not take.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = safe_load(value) if value.startswith("{") else {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise fail(self.key, repr(value), "must be a name, or a name with its keys", f"set e.g. {self.key}=" + (
                f"{self.names[0]} or {self.key}={{name: {self.names[0]}}}"))
        chosen = self.find(value["name"])
        given = {key: each for key, each in value.items() if key != "name"}
        return chosen(**typed(chosen, given, f"{self.key}.", f"{self.key}={value['name']}"))


def plain(plugin: Any) -> dict[str, Any]:
    """Name and keys of a part, as ``Registry.build`` reads them back."""
    return {"name": plugin.name} | {field.name: getattr(plugin, field.name) for field in fields(plugin)}


def typed(owner: type, given: Mapping[str, Any], prefix: str, whose: str) -> dict[str, Any]:
    """Values that are of the types of a dataclass's fields.

    Args:
        owner: the dataclass; fields are of int, float, bool, str, of lists or tuples of one of these, or null.
        given: some of its fields.
        prefix: of a field's key, e.g. "reduction.score.".
        whose: for the message about a key that there is not.

    Raises:
        ConfigError: an unknown key, a value of another type, a missing one.
    """
    if not isinstance(given, Mapping):
        raise fail(prefix.rstrip("."), repr(given), "must be keys with values", f"set e.g. {prefix}{fields(owner)[0].name}")
    hints, known = get_type_hints(owner), [field for field in fields(owner) if field.init]
    names = [field.name for field in known]
    for name in given:
        if name not in names:
            nearest = closest(name, names)
            fix = f"did you mean {prefix}{nearest}?" if nearest else f"leave {prefix}{name} out"
            raise fail(
                f"{prefix}{name}", given[name], f"{whose} has the keys {', '.join(names)}" if names else (
                    f"{whose} has no keys"), fix
            )
    for field in known:
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise fail(f"{prefix}{field.name}", None, f"{whose} needs it", f"set {prefix}{field.name}")
    return {name: _converted(value, hints[name], f"{prefix}{name}") for name, value in given.items()}


def _converted(value: Any, hint: Any, key: str) -> Any:
    """A value in the type of its field: whole numbers become numbers where a field is one, lists tuples."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin = get_origin(option) or option
        if origin is Any or (is_dataclass(origin) and isinstance(value, origin)):
            return value
        if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
            inner = get_args(option)[0]
            return origin(_converted(each, inner, f"{key}[{number}]") for number, each in enumerate(value))
        if origin is float and type(value) in (int, float):
            if not math.isfinite(value):
                raise fail(key, value, "must be a finite number", f"set {key} to one")
            return float(value)
        if type(value) is origin:
            return value
    words = " or ".join(_type_words(option) for option in options)
    raise fail(key, repr(value), f"must be {words}", f"set {key} to such a value")


def _type_words(option: Any) -> str:
    if get_origin(option) in (list, tuple):
        return f"a list of {_WORDS[get_args(option)[0]].rpartition(' ')[2]}s"
    return _WORDS.get(option, "a value")


__all__ = ["ConfigError", "Plugin", "Registry", "plain", "typed"]
