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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar

from yaml import YAMLError, safe_load  # type: ignore[import-untyped]  # the package ships no types

from hybridprune_megatron.bounds import Rule, check_value, rules
from hybridprune_megatron.checks import closest, fail

_STORED: ContextVar[bool] = ContextVar("_STORED", default=False)


@contextmanager
def from_a_file() -> Iterator[None]:
    """What is read inside comes from a file that may be a stranger's: a dotted path in it imports nothing new."""
    token = _STORED.set(True)
    try:
        yield
    finally:
        _STORED.reset(token)


class Plugin:
    """Base of the classes that a name chooses; each is a frozen dataclass whose fields are its keys.

    Attributes:
        name: what chooses it in a configuration.
        before: what keys that came later were worth before, for stored files that lack them.
    """

    name: ClassVar[str]
    before: ClassVar[Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Registry[P: Plugin]:
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
        if _STORED.get() and module not in sys.modules:
            fix = f"if you trust it, name it on the command line: {self.key}={name}"
            raise fail(self.key, name, "is code that a stored file names, and those import nothing", fix)
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
            value = self._read(value) if value.startswith("{") else {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise fail(
                self.key,
                value,
                "must be a name, or a name with its keys",
                f"set e.g. {self.key}=" + (f"{self.names[0]} or {self.key}={{name: {self.names[0]}}}"),
            )
        chosen = self.find(value["name"])
        given = {key: each for key, each in value.items() if key != "name"}
        return chosen(**typed(chosen, given, f"{self.key}.", f"{self.key}={value['name']}"))

    def _read(self, text: str) -> Any:
        try:
            return safe_load(text)
        except (YAMLError, RecursionError) as error:
            fix = f"write it as {self.key}={{name: {self.names[0]}}}"
            raise fail(self.key, text, "cannot be read", fix) from error


def plain(plugin: Any) -> dict[str, Any]:
    """Name and keys of a part, as ``Registry.build`` reads them back."""
    return {"name": plugin.name} | {field.name: getattr(plugin, field.name) for field in fields(plugin)}


def typed(owner: type, given: Mapping[str, Any], prefix: str, whose: str) -> dict[str, Any]:
    """Values that the fields of a dataclass may hold (``bounds``); lists where a field is a tuple become tuples.

    Args:
        owner: the dataclass.
        given: some of its fields.
        prefix: of a field's key, e.g. "reduction.score.".
        whose: for the message about a key that there is not.

    Raises:
        ConfigError: an unknown key, a value that a key does not take, a missing one.
    """
    if not isinstance(given, Mapping):
        raise fail(prefix.rstrip("."), given, "must be keys with values", f"set e.g. {prefix}{fields(owner)[0].name}")
    known = {field.name: field for field in fields(owner) if field.init}
    for name, value in given.items():
        if name not in known:
            nearest = closest(str(name), known)
            fix = f"did you mean {prefix}{nearest}?" if nearest else f"leave {prefix}{name} out"
            allowed = f"{whose} has the keys {', '.join(known)}" if known else f"{whose} has no keys"
            raise fail(f"{prefix}{name}", value, allowed, fix)
    allowed_by_name = rules(owner)
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in given:
            raise fail(f"{prefix}{name}", None, f"{whose} needs it", f"set {prefix}{name}")
        if name in given:
            default = None if field.default is MISSING else field.default
            check_value(f"{prefix}{name}", given[name], allowed_by_name[name], default)
    return {name: _converted(value, allowed_by_name[name]) for name, value in given.items()}


def _converted(value: Any, rule: Rule) -> Any:
    """A value that has been checked, in the type of its field."""
    if value is None:
        return None
    if rule.kind in (list, tuple) and rule.item is not None:
        return rule.kind(_converted(each, rule.item) for each in value)
    return float(value) if rule.kind is float else value
