"""What a field of the schema may hold, declared next to it, and the one check of all fields.

    max_steps: Annotated[int, Range(1, 10**9)]
    precision: Annotated[str, OneOf("fp32", "bf16")] = "bf16"

What is not declared follows from the type: numbers are finite and fit 32 bits, text is not blank. The export carries
this file, so it imports nothing slow.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hybridprune_megatron.checks import closest, fail

#: Seeds, shapes and counts of torch, numpy and the launchers are good for 31 bits.
LARGEST = 2**31 - 1
#: Numbers end up in float32, where what is larger is infinite and what is smaller 0.
FLOAT_MAX, FLOAT_MIN = 3.4e38, 1.2e-38
_KIND_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``.

    Attributes:
        low: smallest value.
        high: largest value.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.
        meaning: what the number is, for the error line.
        example: a value to suggest; None: the field's default.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    meaning: str = ""
    example: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a finite number is allowed."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def words(self, value: float) -> str:
        """What is allowed, as far as it concerns a value that is not."""
        return f"must be {self._span(value)}{f' ({self.meaning})' if self.meaning else ''}"

    def _span(self, value: float) -> str:
        if self.high == FLOAT_MAX:
            start = "" if self.low == -FLOAT_MAX else f" above {self.low:g}" if self.above else f" from {self.low:g} on"
            return f"a finite number{start}"
        if isinstance(value, int) and not self.above and not self.below and self.high > 1:
            return f"at least {self.low}" if value < self.low else f"at most {self.high}"
        start = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        if self.below:
            return f"{start} {'and' if self.above else 'to'} below {self.high:g}"
        return f"{start} and at most {self.high:g}" if self.above else f"{start} to {self.high:g}"


class OneOf:
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words


class Text:
    """Text that may be empty, with line ends."""


#: Whole numbers: 0 or more, 1 or more, and sizes that a model may have.
Whole = Annotated[int, Range(0, LARGEST)]
Count = Annotated[int, Range(1, LARGEST)]
Size = Annotated[int, Range(1, 2**20)]
#: Ranks and resumed runs add to seeds; numpy takes 32 bits.
Seed = Annotated[int, Range(0, LARGEST)]
Steps = Annotated[int, Range(1, 10**9)]
Ways = Annotated[int, Range(1, 2**16)]
Positive = Annotated[float, Range(0, FLOAT_MAX, above=True)]
NotNegative = Annotated[float, Range(0, FLOAT_MAX)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]


@dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Attributes:
        kind: type without None; list for lists.
        optional: None is allowed.
        bound: ``Range``, ``OneOf`` or ``Text`` of the value, None where the type says it all.
        item: rule of a list's items.
    """

    kind: Any
    optional: bool = False
    bound: Any = None
    item: Rule | None = None


@cache
def rules(owner: type) -> Mapping[str, Rule]:
    """The rule of every field of a dataclass of the schema, from its annotations."""
    hints = get_type_hints(owner, include_extras=True)
    return {field.name: _rule(hints[field.name]) for field in fields(owner)}


def _rule(hint: Any) -> Rule:
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(option for option in get_args(hint) if option is not type(None))
        found = _rule(inner)
        return Rule(found.kind, True, found.bound, found.item)
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound, *_ = get_args(hint)
    if get_origin(hint) in (list, tuple):
        return Rule(get_origin(hint), bound=bound, item=_rule(get_args(hint)[0]))
    return Rule(get_origin(hint) or hint, bound=bound)


def check_bounds(prefix: str, owner: Any) -> None:
    """Every field of a dataclass holds what its annotation allows.

    Args:
        prefix: dotted name of the group, "" for the top level.
        owner: a dataclass of the schema.

    Raises:
        ConfigError: naming the first that does not.
    """
    allowed = rules(owner.__class__)
    for field in fields(owner):
        key = f"{prefix}.{field.name}" if prefix else field.name
        default = None if field.default is MISSING else field.default
        check_value(key, getattr(owner, field.name), allowed[field.name], default)


def read_value(key: str, text: str, owner: type, name: str) -> Any:
    """The value of a field from the text of a command line; text fields take it as it is, ``null`` is None.

    Args:
        key: what to call the field in an error.
        text: right of the equals sign; of a list its items with commas between them, in brackets or without.
        owner: a dataclass with plain fields.

    Raises:
        ConfigError: the text is of another type.
    """
    rule, default = rules(owner)[name], getattr(owner, name, None)
    if text == "null" and rule.optional:
        return None
    if rule.kind is str:
        return text
    try:
        if rule.kind in (list, tuple):
            assert rule.item is not None, name
            inner = text.strip().removeprefix("[").removesuffix("]")
            return rule.kind(rule.item.kind(item) for item in inner.split(",") if inner.strip())
        return rule.kind(text)
    except ValueError:
        example = getattr(rule.bound, "example", None) or default
        fix = f"give {_KIND_WORDS[rule.kind]}" if example is None else f"set e.g. {key}={example}"
        raise fail(key, text, f"must be {_KIND_WORDS[rule.kind]}", fix) from None


def check_value(key: str, value: Any, rule: Rule, default: Any = None) -> None:
    """A value is what its rule allows.

    Args:
        default: the field's default, to suggest.

    Raises:
        ConfigError: it is not.
    """
    if value is None and (rule.optional or rule.kind is Any):
        return
    example = getattr(rule.bound, "example", None) or default
    if rule.kind is Any or rule.kind is dict:
        _check_kind(key, value, rule.kind is Any or isinstance(value, dict), "a group of keys", default)
        _check_free(key, value)
    elif isinstance(rule.kind, type) and is_dataclass(rule.kind):
        _check_kind(key, value, isinstance(value, rule.kind), "a group of keys", default)
    elif rule.kind is float:
        _check_kind(key, value, type(value) in (int, float), _KIND_WORDS[float], example)
        _check_number(key, value, rule.bound or Range(-FLOAT_MAX, FLOAT_MAX), example)
    elif rule.kind is int:
        _check_kind(key, value, type(value) is int, _KIND_WORDS[int], example)
        _check_number(key, value, rule.bound or Range(-LARGEST, LARGEST), example)
    elif rule.kind is str:
        _check_kind(key, value, isinstance(value, str), _KIND_WORDS[str], example)
        _check_text(key, value, rule.bound, f", or {key}=null" if rule.optional else "")
    elif rule.kind in (list, tuple):
        _check_kind(key, value, isinstance(value, list | tuple), _KIND_WORDS[list], default)
        assert rule.item is not None, key
        for index, item in enumerate(value):
            check_value(f"{key}[{index}]", item, rule.item)
    else:
        _check_kind(key, value, type(value) is rule.kind, _KIND_WORDS.get(rule.kind, str(rule.kind)), default)


def _check_kind(key: str, value: Any, fits: bool, words: str, example: Any) -> None:
    if not fits:
        fix = f"give {words}" if example is None else f"set e.g. {key}={example}"
        raise fail(key, value, f"must be {words}", fix)


def _check_number(key: str, value: float, bound: Range, example: Any) -> None:
    fix = f"set e.g. {key}={example}" if example is not None else f"set {key} inside that range"
    # Nothing holds for a number that is none, and no range reaches infinity.
    if not bound.holds(value):
        raise fail(key, value, bound.words(value), fix)
    if value and abs(value) < FLOAT_MIN:
        raise fail(key, value, "is 0 in float32, which models compute in", f"set {key} to 0, or above {FLOAT_MIN:g}")


def _check_text(key: str, value: str, bound: Any, unset: str) -> None:
    if isinstance(bound, OneOf):
        if value not in bound.words:
            nearest = closest(value, bound.words)
            fix = f"did you mean {nearest}?" if nearest else f"set e.g. {key}={bound.words[0]}"
            raise fail(key, value, f"allowed are {', '.join(bound.words)}", fix)
        return
    if not isinstance(bound, Text):
        if not value.strip():
            reason = "is empty, as an unset shell variable is"
            raise fail(key, value, reason, f"give it a value{unset}")
        if not value.isprintable() or value != value.strip():
            raise fail(key, repr(value), "begins or ends with a space, or holds a control character", "leave those out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise fail(key, ascii(value), "is not valid UTF-8", "write it in UTF-8") from None


def _check_free(key: str, value: Any) -> None:
    """A value that another library checks: its numbers are finite and its texts are not blank all the same."""
    for name, leaf in _leaves(key, value):
        if isinstance(leaf, bool) or leaf is None:
            continue
        if isinstance(leaf, int | float):
            _check_number(name, leaf, Range(-FLOAT_MAX, FLOAT_MAX), None)
        elif isinstance(leaf, str):
            _check_text(name, leaf, None, "")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{key}[{index}]", item)
    else:
        yield key, value
