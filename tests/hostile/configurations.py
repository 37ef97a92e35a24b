"""Random configurations over the schema: keys with values of every wrong kind, alone and in pairs, and what is due."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hybridprune_megatron.config.bounds import OneOf, Range, Rule, Text, rules
from hybridprune_megatron.config.fields import is_group, leaf_keys, type_of_key, without_none
from hybridprune_megatron.config.schema import Config

#: What no key may be set to, and what few may, as texts of the command line.
ODD_TEXTS = (
    *("", " ", "''", '""', "abc", "None", "null", "true", "false", "yes", "off", "~", "???", "-", "."),
    *(
        "0",
        "1",
        "2",
        "3",
        "7",
        "-1",
        "-0",
        "+5",
        "007",
        "1_000",
        "0x10",
        "0.5",
        "1.0",
        "1.10",
        "2.5",
        "-2.5",
        ".5",
        "5.",
    ),
    *("nan", "inf", "-inf", "NaN", ".nan", ".inf", "1e3", "1e-3", "1e39", "1e-39", "1e400", "1e-400", "-1e400"),
    *("9" * 26, "9" * 400, "9" * 5000, "2147483647", "2147483648", "4294967296", "9223372036854775808", "1e30"),
    *("[]", "[1]", "[1,2]", "[nan]", "[0.5,x]", "[[1]]", "[true]", "[null]", "{}", "{a: 1}", "{a: {b: [1]}}", "[1,"),
    *("'1'", "'nan'", "'1.5'", "'true'", '"a b"', "'a,b'", "a,b", "1,2", "range(1,3)", "choice(1,2)", "int(3)"),
    *("${name}", "${trainer.seed}", "${nope}", "${oc.env:NO_SUCH_VARIABLE}", "${", "$", "${name", "'${model}'"),
    *("../../etc", "/etc", "..", "a/../b", "a//b", "a/", "/", "~/x", "runs/x", "x" * 300, "x/" + "y" * 300),
    *("a\nb", "'a\nb'", "'a\tb'", "a\x00b", "'\x1b[31m'", "\udcff", "'\udcff'", "\u00e4", "\u202e", "' a'", "a b"),
    *("<img>", "<SPECIAL_{index}>", "'{index}'", "'{seconds:.2f}'", "'{index.real}'", "'{index:999999999}'", "'{'"),
    *("[" * 3000, "{a:" * 500, "x" * 100_000, "M-M*-", "MEM", "M|M", "MM|", "all", "every_0", "every_1", "[0,2]"),
    *("%s", "%", "=", "==", "a=b", "#", "\\", "'", '"', "@x", "!x", "&x", "*x", "`id`", "$(id)", ";", "|", "<", ">"),
)


@dataclass(frozen=True)
class Due:
    """What a value of a key must become.

    Attributes:
        refused: it must be refused, by a line with the key.
        value: what the configuration holds if it is taken; other keys may still stand against it.
        known: the value is known; else it only must be one that the key allows.
    """

    refused: bool
    value: Any = None
    known: bool = True


REFUSED = Due(True)


def key_rules() -> dict[str, Rule]:
    """The rule of every key that holds a value, by its dotted name."""
    found = {}
    for key in leaf_keys():
        owner: Any = Config
        for group in key.split(".")[:-1]:
            owner = without_none(rules_type(owner, group))
        found[key] = rules(owner)[key.rpartition(".")[2]]
    return found


def rules_type(owner: Any, name: str) -> Any:
    """The type of a group's key."""
    return rules(owner)[name].kind


def random_overrides(draw: random.Random, keys: dict[str, Rule]) -> list[tuple[str, str]]:
    """One or two keys, each with an odd text or with one at its bounds."""
    chosen = draw.sample(sorted(keys), draw.choice((1, 1, 2)))
    return [(key, draw.choice(_texts(keys[key], draw))) for key in chosen]


def every_key_with_every_text(keys: dict[str, Rule]) -> Iterator[tuple[str, str]]:
    """All pairs of a key and an odd text, or one at its bounds."""
    for key, rule in keys.items():
        for text in dict.fromkeys([*ODD_TEXTS, *_bounds(rule)]):
            yield key, text


def _texts(rule: Rule, draw: random.Random) -> list[str]:
    bounds = _bounds(rule)
    return bounds if bounds and draw.random() < 0.3 else list(ODD_TEXTS)


def _bounds(rule: Rule) -> list[str]:
    """Texts at the bounds of a key, on both sides."""
    if rule.kind is list and rule.item is not None:
        return [f"[{text}]" for text in _bounds(rule.item)]
    if isinstance(rule.bound, OneOf):
        return [*rule.bound.words, rule.bound.words[0].upper(), rule.bound.words[0] + "x"]
    if not isinstance(rule.bound, Range):
        return []
    low, high = rule.bound.low, rule.bound.high
    near = (low, high, (low + high) / 2, low - 1, high + 1, 2 * high, -high)
    if rule.kind is int:
        return [str(int(number)) for number in near]
    return [repr(float(number)) for number in (*near, math.nextafter(low, -1), math.nextafter(high, math.inf))]


def due(key: str, text: str, rule: Rule) -> Due:
    """What becomes of a text as the value of a key, by the key's type and bounds alone."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, ValueError, RecursionError):
        return REFUSED
    value = override.value()
    if override.is_sweep_override():
        return REFUSED
    if isinstance(value, str) and "${" in value:
        return Due(False, known=False)
    if value == "???":
        return REFUSED
    if rule.kind is str and isinstance(value, int | float):
        value = text.strip()
    return _due(key, value, rule)


def _due(key: str, value: Any, rule: Rule) -> Due:
    if value is None:
        return Due(False, None) if rule.optional or rule.kind is Any else REFUSED
    if rule.kind in (Any, dict) or is_group(type_of_key(key)):
        return Due(False, known=False)
    if rule.kind is list:
        items = [_due(key, item, rule.item) for item in value] if isinstance(value, list) else [REFUSED]
        return REFUSED if any(item.refused for item in items) else Due(False, [item.value for item in items])
    try:
        converted = _converted(value, rule.kind)
    except (ValueError, OverflowError):
        return REFUSED
    return Due(False, converted) if allowed(key, converted, rule) else REFUSED


def _converted(value: Any, kind: type) -> Any:
    """A value as a typed configuration takes it: numbers from texts, but neither from switches."""
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "y": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "n": False, "0": False}
        if str(value).lower() not in words or isinstance(value, float | list | dict):
            raise ValueError(value)
        return words[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(value)
        return value
    if isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
        raise ValueError(value)
    return kind(value)


def allowed(key: str, value: Any, rule: Rule) -> bool:
    """Whether a key may hold a value of its type: finite, within bounds, and text that makes sense."""
    if value is None:
        return rule.optional or rule.kind is Any
    if rule.kind is list:
        return all(allowed(key, item, rule.item) for item in value)
    if rule.kind in (int, float):
        bound = rule.bound or Range(
            -(2**31) + 1 if rule.kind is int else -3.4e38, 2**31 - 1 if rule.kind is int else 3.4e38
        )
        inside = (bound.low < value if bound.above else bound.low <= value) and (
            value < bound.high if bound.below else value <= bound.high
        )
        return inside and math.isfinite(value) and (rule.kind is int or value == 0 or abs(value) >= 1.2e-38)
    if rule.kind is str:
        if isinstance(rule.bound, OneOf):
            return value in rule.bound.words
        if isinstance(rule.bound, Text):
            return value.isascii() or "\udcff" not in value
        return bool(value.strip()) and value == value.strip() and value.isprintable()
    return True
