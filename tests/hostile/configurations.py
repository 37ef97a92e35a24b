"""Random configurations over the schema: keys with values of every wrong kind, alone and in pairs, and what is due."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from hybridprune_megatron.bounds import OneOf, Range, Rule, Text, rules
from hybridprune_megatron.config.compose import compose_config, set_keys, to_config
from hybridprune_megatron.config.fields import is_group, leaf_keys
from hybridprune_megatron.config.reduction_schema import PARTS
from hybridprune_megatron.config.schema import Config

#: What no key may be set to, and what few may, as texts of the command line.
ODD_TEXTS = (
    *("", " ", "''", '""', "abc", "None", "null", "true", "false", "yes", "off", "~", "???", "-", "."),
    *("0", "1", "2", "3", "7", "-1", "-0", "+5", "007", "1_000", "0x10", "0.5", "1.0", "1.10", "2.5", "-2.5", ".5"),
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
    """What must become of a text as the value of a key.

    Attributes:
        refused: it must be refused, by a line with the key.
        value: what the configuration holds if it is taken; another key may still stand against it.
        known: the value is known; else it only must be one that the key allows.
    """

    refused: bool
    value: Any = None
    known: bool = True


REFUSED = Due(True)
_SWITCH = {"true": True, "yes": True, "on": True, "y": True, "1": True}
_SWITCH |= {"false": False, "no": False, "off": False, "n": False, "0": False}


def with_keys(overrides: Sequence[str]) -> Config:
    """The demo's configuration with single keys changed; that of a model with experts where they are experts' keys."""
    model = "demo_experts" if any(text.startswith("model.experts.") for text in overrides) else "demo"
    changed = copy.deepcopy(_composed(model))
    set_keys(changed, [*_choices(overrides), *overrides])
    return to_config(changed)


def _choices(overrides: Sequence[str]) -> list[str]:
    """What has to be chosen so that keys of a score, a schedule or a front are there."""
    found = {}
    for key in (text.partition("=")[0] for text in overrides):
        part, _, name = key.removeprefix("reduction.").partition(".")
        if key.startswith("reduction.") and part in PARTS and name:
            registry = PARTS[part]
            owners = [each for each in registry.names if name in rules(registry.find(each))]
            chosen = getattr(to_config(_composed("demo")).reduction, part).name
            if chosen not in owners:
                found[part] = f"reduction.{part}={owners[0]}"
    share = "reduction.front.retention"
    if "front" in found and not any(text.startswith(f"{share}=") for text in overrides):
        # A front that passes on everything is refused, before what the case is about.
        found[share] = f"{share}=0.5"
    return list(found.values())


@cache
def _composed(model: str) -> DictConfig:
    """Composing takes a third of a second, so all cases of a model start from one."""
    return compose_config(["experiment=demo", f"model={model}"])


def key_rules() -> dict[str, Rule]:
    """The rule of every key that holds a value, by its dotted name."""
    found = {}
    for key in leaf_keys():
        owner: Any = Config
        *groups, name = key.split(".")
        for group in groups:
            owner = rules(owner)[group].kind
        found[key] = rules(owner)[name]
    for part, registry in PARTS.items():
        for name in registry.names:
            found |= {f"reduction.{part}.{each}": rule for each, rule in rules(registry.find(name)).items()}
    return found


def random_overrides(draw: random.Random, keys: dict[str, Rule]) -> list[tuple[str, str]]:
    """One or two keys, each with an odd text or with one near its bounds."""
    chosen = draw.sample(sorted(keys), draw.choice((1, 1, 2)))
    # Keys of two scores, schedules or fronts do not go together.
    groups = [key.rpartition(".")[0] for key in chosen if key.count(".") == 2]
    if len(set(groups)) < len(groups):
        chosen = chosen[:1]
    return [(key, draw.choice(_texts(keys[key], draw))) for key in chosen]


def _texts(rule: Rule, draw: random.Random) -> list[str]:
    bounds = _bounds(rule)
    return bounds if bounds and draw.random() < 0.3 else list(ODD_TEXTS)


def _bounds(rule: Rule) -> list[str]:
    """Texts at the bounds of a key, on both sides."""
    if rule.kind in (list, tuple) and rule.item is not None:
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
    if override.is_sweep_override() or value == "???":
        return REFUSED
    if isinstance(value, str) and "${" in value:
        return Due(False, known=False)
    if rule.kind is str and isinstance(value, int | float):
        value = text.strip()
    return _due(key, value, rule)


def _due(key: str, value: Any, rule: Rule) -> Due:
    if value is None:
        return Due(False) if rule.optional or rule.kind is Any else REFUSED
    if rule.kind in (Any, dict) or is_group(rule.kind):
        # Looked into by checks of their own.
        return Due(False, known=False)
    if rule.kind in (list, tuple):
        items = [_due(key, item, rule.item) for item in value] if isinstance(value, list) else [REFUSED]
        return REFUSED if any(item.refused for item in items) else Due(False, [item.value for item in items])
    try:
        converted = _converted(value, rule.kind)
    except (ValueError, OverflowError):
        return REFUSED
    return Due(False, converted) if allowed(converted, rule) else REFUSED


def _converted(value: Any, kind: type) -> Any:
    """A value as a typed configuration takes it: numbers from texts, but neither from switches nor from fractions."""
    if kind is bool and not isinstance(value, float | list | dict) and str(value).lower() in _SWITCH:
        return _SWITCH[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if (
        kind in (int, float)
        and not isinstance(value, bool | list | dict)
        and not (kind is int and type(value) is float)
    ):
        return kind(value)
    raise ValueError(value)


def allowed(value: Any, rule: Rule) -> bool:
    """Whether a value has the right type, is finite, within its bounds, and a text that means something."""
    if value is None:
        return rule.optional or rule.kind is Any
    if rule.kind in (list, tuple):
        return isinstance(value, list | tuple) and all(allowed(item, rule.item) for item in value)
    if rule.kind is int:
        bound = rule.bound or Range(1 - 2**31, 2**31 - 1)
        return type(value) is int and bound.low <= value <= bound.high
    if rule.kind is float:
        bound = rule.bound or Range(-3.4e38, 3.4e38)
        inside = type(value) in (int, float) and bound.low <= value <= bound.high
        inside = inside and (value == 0 or abs(value) >= 1.2e-38)
        return inside and not (bound.above and value == bound.low) and not (bound.below and value == bound.high)
    if rule.kind is str:
        return isinstance(value, str) and _allowed_text(value, rule.bound)
    return rule.kind in (Any, dict) or type(value) is rule.kind


def _allowed_text(value: str, bound: Any) -> bool:
    if isinstance(bound, OneOf):
        return value in bound.words
    plain = bool(value.strip()) and value == value.strip() and value.isprintable()
    return "\udcff" not in value and (plain or isinstance(bound, Text))
