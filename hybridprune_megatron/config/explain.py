"""One clear line for what Hydra and OmegaConf refuse.

Overrides are looked at one by one before Hydra sees them: Hydra's own errors take several lines and name neither the
nearest key nor the options. What slips through (broken files, interpolations) is cut down to one line.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from hybridprune_megatron.checks import closest, shown
from hybridprune_megatron.config.fields import (
    all_keys,
    default_of,
    field_help,
    field_types,
    is_group,
    is_passed_on,
    type_of_key,
    type_words,
    without_none,
)
from hybridprune_megatron.config.legacy import MOVED
from hybridprune_megatron.config.reduction_schema import PARTS
from hybridprune_megatron.config.schema import Config

#: The groups of ``conf/``, in the order in which ``--help`` names them.
GROUPS = ("experiment", "model", "data", "reduction", "tuning", "optim", "trainer", "fp8", "parallel")
#: Characters of an override: the parser is slow, and gives up on deep brackets.
_LONGEST = 20_000
_SWITCH_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"}


def group_options(conf_dir: Path, group: str) -> list[str]:
    """Names that a group of ``conf/`` can be set to."""
    return sorted(path.stem for path in (conf_dir / group).glob("*.yaml"))


def explain_override(text: str, conf_dir: Path) -> str | None:
    """What is wrong with one override, in one line; None if nothing is (or Hydra will say).

    Args:
        text: an override as it stands on the command line.
    """
    if "=" not in text and not text.startswith("~"):
        return f"{text}: is not an override; write key=value, e.g. experiment=demo (--help lists the keys)"
    if len(text) > _LONGEST:
        return f"{shown(text)}: is too long; write it into a file of conf"
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        reason = shown(_one_line(error))
        return f"{shown(text)}: cannot be read ({reason}); quote it, e.g. 'key=[1,2]' or 'key=\"a, b\"'"
    key, value = override.key_or_group, override.value()
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return f"{shown(text)}: Hydra's own settings are fixed; leave it out, output_dir says where a run writes"
    text = shown(text)
    if override.is_sweep_override():
        return f"{text}: names several values, and a run takes one; write a list as '{key}=[a,b]'"
    if override.is_delete():
        return f"{text}: keys cannot be deleted; set {key} to null or to its default instead"
    if key in GROUPS:
        return _explain_group(key, value, conf_dir, added=override.is_add())
    return _explain_key(key, value, text.partition("=")[2], added=override.is_add())


def _explain_group(group: str, value: object, conf_dir: Path, added: bool) -> str | None:
    """A group is set to one of its files."""
    if added:
        return f"+{group}={value}: {group} exists already; leave the + out"
    options = group_options(conf_dir, group)
    if value in options or (group == "experiment" and value is None):
        return None
    nearest = closest(str(value), options)
    fix = f"did you mean {group}={nearest}?" if nearest else f"set e.g. {group}={options[0]}"
    keys = "" if group == "experiment" else f" (single values are set as {group}.key=value)"
    return f"{group}={value}: conf/{group} has {', '.join(options)}{keys}; {fix}"


def _explain_key(key: str, value: Any, shown: str, added: bool) -> str | None:
    """A key exists in the schema and takes the value's type."""
    owner: Any = Config
    parts = key.split(".")
    if len(parts) > 2 and parts[0] == "reduction" and parts[1] in PARTS:
        # Which keys there are depends on what is chosen: the part itself refuses the others.
        return None
    if len(parts) == 2 and parts[0] == "reduction" and parts[1] in MOVED:
        part, name = MOVED[parts[1]]
        now = f"reduction.{part}" if name == "name" else f"reduction.{part}.{name}"
        return f"{key}={shown}: {key} is {now} since version 0.2"
    for depth, part in enumerate(parts[:-1]):
        hint = field_types(owner).get(part)
        if is_passed_on(hint):
            # Another library knows these keys; "+" adds one.
            return None
        if not is_group(hint):
            return _unknown_key(".".join(parts[: depth + 1]), key, shown)
        owner = without_none(hint)
    name = parts[-1]
    if name not in field_types(owner):
        return _unknown_key(key, key, shown)
    if added:
        return f"+{key}={shown}: {key} exists already; leave the + out"
    hint = field_types(owner)[name]
    if is_group(hint) or is_passed_on(hint):
        return None if value is None or isinstance(value, dict) else _wrong_type(owner, name, key, shown)
    if without_none(hint) is bool and str(value).lower() not in _SWITCH_WORDS:
        # OmegaConf takes any number for a switch.
        return _wrong_type(owner, name, key, shown)
    try:
        OmegaConf.update(_scratch(owner), name, value)
    except (OmegaConfBaseException, OverflowError):
        return _wrong_type(owner, name, key, shown)
    return None


def as_typed(text: str) -> str:
    """An override (that ``explain_override`` has passed) whose value stays the text that was typed, where text is due.

    ``name=1.10`` would otherwise be read as a number and become the name 1.1, that of another run.
    """
    override = OverridesParser.create().parse_override(text)
    key, _, typed = text.partition("=")
    if not isinstance(override.value(), int | float) or without_none(type_of_key(override.key_or_group)) is not str:
        return text
    return f"{key}='{typed.strip()}'"


@cache
def _scratch(owner: type) -> DictConfig:
    """A group to try values on; what it holds does not matter. Made once, for that takes a twentieth of a second."""
    return OmegaConf.structured(owner)


def _unknown_key(key: str, full: str, shown: str | None = None) -> str:
    """Names the nearest key: the same last word anywhere, a similar dotted name, or a similar word in the same group.

    Args:
        key: the part of the dotted name that is unknown.
        shown: the value that was given, None if it is not at hand.
    """
    keys = list(all_keys())
    head = full if shown is None else f"{full}={shown}"
    last = full.rpartition(".")[2]
    same = [candidate for candidate in keys if candidate.rpartition(".")[2] == last and "." in candidate]
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in keys}
    near_leaf = closest(last, leaves)
    nearest = same[0] if same else closest(full, keys) or (leaves[near_leaf] if near_leaf else None)
    if nearest is not None:
        return f"{head}: unknown key {key}; did you mean {nearest}?"
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    names = ", ".join(sibling.rpartition(".")[2] for sibling in siblings)
    return f"{head}: unknown key {key}; {parent or 'the top level'} has {names} (see --help-all)"


def _wrong_type(owner: Any, name: str, key: str, shown: str) -> str:
    """Names the expected type and what the key is, with the default as an example where there is one."""
    hint = field_types(owner)[name]
    words, default = type_words(hint), default_of(owner, name)
    if is_group(hint):
        fix = f"set one of its keys, e.g. {key}.{next(iter(field_types(without_none(hint))))}=..."
    else:
        fix = f"give {words}" if default is None else f"set e.g. {key}={default}"
    return f"{key}={shown}: has the wrong type, expected {words} ({field_help(owner, name).rstrip('.')}); {fix}"


def explain_exception(error: BaseException) -> str:
    """One line from an exception of Hydra or OmegaConf, with the key in front where it is known."""
    cause: BaseException | None = error
    # Hydra raises its own exception while it handles OmegaConf's, which knows the key.
    while cause is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return _one_line(error)
    key = str(getattr(cause, "full_key", ""))
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: is not set, neither by a file in conf/ nor on the command line; give {key}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        group = key.partition(".")[0]
        if is_passed_on(field_types(Config).get(group)):
            return f"{key}: {group} does not set it yet; to pass it on write +{key}=value"
        return f"{_unknown_key(key, key)} (a file in conf/ sets it)"
    line = _one_line(cause)
    return line if key in line else f"{key}: {line}"


def _one_line(error: BaseException) -> str:
    """The first sentence lines of an exception without OmegaConf's appendix of types."""
    kept = [line.strip() for line in str(error).splitlines() if line.strip()]
    cut = next((i for i, line in enumerate(kept) if line.startswith(("full_key:", "See https"))), len(kept))
    return " ".join(kept[: max(cut, 1)])
