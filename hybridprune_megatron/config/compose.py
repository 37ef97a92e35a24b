"""From command-line overrides to a checked ``Config``: Hydra composes ``conf/`` under the typed schema.

Only Hydra and OmegaConf are imported, so that a recipe reports a wrong value within a second or two:

    cfg = parse_command_line(sys.argv[1:])  # a ConfigError of one line if something is wrong
    from hybridprune_megatron import engine  # the slow imports come after it
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # the package ships no types
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridprune_megatron.checks import ConfigError, fail, shown
from hybridprune_megatron.config.data_sets import check_data_sets
from hybridprune_megatron.config.explain import GROUPS, as_typed, explain_exception, explain_override
from hybridprune_megatron.config.fields import is_group, type_of_key, without_none
from hybridprune_megatron.config.files import check_files
from hybridprune_megatron.config.flat import leaves
from hybridprune_megatron.config.help import usage
from hybridprune_megatron.config.reduction_schema import PARTS
from hybridprune_megatron.config.resume import check_resume
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.config.shipped import CONF_DIR, shipped_path
from hybridprune_megatron.plugins import from_a_file


def register_schema() -> None:
    """Makes the typed schema known to Hydra as ``schema``, the first entry of ``conf/config.yaml``. Repeatable."""
    ConfigStore.instance().store(name="schema", node=Config)


def find_plugins() -> None:
    """Has Hydra look for its plugins, which it does once, among its own alone.

    Energon's storage client brings one for configurations in object stores, whose import takes a third of a start.
    """
    package = "hydra_plugins"
    if package in sys.modules:
        return
    sys.modules[package] = None  # type: ignore[assignment]  # an import of it fails, as where there are none
    try:
        Plugins.instance()
    finally:
        del sys.modules[package]


def compose_config(
    overrides: Sequence[str] = (), config_name: str = "config", look_at_files: bool = False
) -> DictConfig:
    """Composes ``conf/`` with the overrides under the schema; nothing is resolved or checked across groups yet.

    Args:
        overrides: Hydra overrides, e.g. ["experiment=demo", "reduction.budget=0.35"].
        config_name: file of ``conf/`` to start from, without its ending.
        look_at_files: check that files say what is read of them, which takes half as long again.

    Raises:
        ConfigError: one line on the first unknown key, wrong type, unknown option or broken file.
    """
    register_schema()
    find_plugins()
    _check_overrides(overrides)
    typed = hydra_overrides(overrides)
    with _explained(), initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        composed = compose(config_name, overrides=typed)
        if look_at_files:
            check_written(CONF_DIR, config_name, typed)
        _find_shipped(composed)
        return composed


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """What Hydra is given for the overrides of a command line, which ``_check_overrides`` has passed."""
    return [as_typed(override) for override in part_overrides(overrides)]


def _find_shipped(composed: DictConfig) -> None:
    """The demo's files, which its configuration names relative to a checkout, are found from any folder."""
    for key in ("model.init_checkpoint", "data.tokenizer"):
        named = OmegaConf.select(composed, key)
        if isinstance(named, str) and shipped_path(named) != named:
            OmegaConf.update(composed, key, shipped_path(named))


@contextmanager
def _explained() -> Iterator[None]:
    """What Hydra, OmegaConf and YAML refuse, as one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OverflowError, RecursionError) as error:
        raise ConfigError(explain_exception(error)) from error
    except AttributeError as error:
        # OmegaConf cannot fill a null group from the command line.
        key = re.search(r"full_key: (\S+)", str(error))
        if key is None:
            raise
        raise _null_group(key[1]) from error


def _null_group(key: str) -> ConfigError:
    return ConfigError(
        f"{key} is null in this model and cannot be filled from the command line; take a model that has it, or "
        "write its fields into a file of conf/model"
    )


def load_config(overrides: Sequence[str] = (), config_name: str = "config") -> Config:
    """Composes, resolves and checks a configuration.

    Args:
        overrides: Hydra overrides, e.g. ["experiment=demo", "reduction.budget=0.35"].
        config_name: file of ``conf/`` to start from, without its ending.

    Returns:
        The typed configuration; every check of the schema has passed.

    Raises:
        ConfigError: one line that names the value, what is allowed, the key and the fix.
    """
    return to_config(compose_config(overrides, config_name))


def to_config(composed: DictConfig) -> Config:
    """Resolves a composed configuration (also one from hydra_runner) into dataclasses, which checks it.

    Raises:
        ConfigError: as ``load_config``.
    """
    with _explained():
        cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, Config), type(cfg)
    return cfg


def change_config(
    saved: Mapping[str, Any], overrides: Sequence[str] = (), fixed: Mapping[str, Any] | None = None
) -> Config:
    """A stored configuration with some keys changed.

    Args:
        saved: values by group, as ``asdict`` gives them and a checkpoint keeps them.
        overrides: ``key=value`` texts, as on the command line; a group's file cannot be named.
        fixed: values by group that come last.

    Raises:
        ConfigError: as ``load_config``.
    """
    with _explained():
        changed: Any = OmegaConf.merge(OmegaConf.structured(Config), saved)
        set_keys(changed, overrides)
        changed.merge_with(fixed or {})
        import_named(overrides)
        with from_a_file():
            return to_config(changed)


def set_keys(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Sets single keys of a composed configuration in place.

    Raises:
        ConfigError: one line on the first override that cannot be.
    """
    with _explained():
        _check_overrides(overrides)
        for text in hydra_overrides(overrides):
            override = OverridesParser.create().parse_override(text)
            key = override.key_or_group
            if key in GROUPS:
                what = "the configuration is there already; change single keys as group.key=value"
                raise ConfigError(f"{shown(text)}: {what}")
            group = key.rpartition(".")[0]
            if is_group(type_of_key(group)) and OmegaConf.select(composed, group) is None:
                raise _null_group(group)
            added = override.is_add() or override.is_force_add()
            OmegaConf.update(composed, key, override.value(), merge=True, force_add=added)


def _check_overrides(overrides: Sequence[str]) -> None:
    for text in overrides:
        problem = explain_override(text, CONF_DIR)
        if problem is not None:
            raise ConfigError(problem)


def checked_config(overrides: Sequence[str], config_name: str = "config", need_files: bool = False) -> Config:
    """``load_config`` for commands: files of ``conf/`` say what is read of them, too.

    Args:
        config_name: file of ``conf/`` to start from, without its ending.
        need_files: also check that the run can start: its files are there, and
            its folder holds no other run.

    Raises:
        ConfigError: as ``load_config``.
    """
    cfg = to_config(compose_config(overrides, config_name, look_at_files=True))
    if need_files:
        check_files(cfg)
        check_data_sets(cfg)
        check_resume(cfg)
    return cfg


def parse_command_line(argv: Sequence[str], need_files: bool = True) -> Config:
    """The first line of a recipe: options and overrides to a checked configuration.

    ``--help`` prints the groups and the most used keys, ``--help-all`` every key, ``--cfg job`` the resolved
    configuration; all three exit with code 0 and show what the other arguments make of it.

    Args:
        argv: arguments without the program's name.
        need_files: check that the data, tokenizer and weights of the run are there.

    Returns:
        The typed configuration.

    Raises:
        ConfigError: one line on the first wrong argument.
    """
    options, overrides = _split_options(argv)
    if not options:
        return checked_config(overrides, need_files=need_files)
    composed = compose_config(overrides)
    if "--cfg" in options:
        # With the keys of the score, the schedule and the front that were chosen.
        reduction = to_config(composed).reduction.plain()
        resolved: Any = OmegaConf.to_container(composed, resolve=True)
        print(OmegaConf.to_yaml(OmegaConf.create(resolved | {"reduction": reduction})), end="")
    else:
        print(usage(composed, CONF_DIR, everything="--help-all" in options))
    sys.exit(0)


def _split_options(argv: Sequence[str]) -> tuple[set[str], list[str]]:
    """Options, spelled the long way, and overrides; a ``ConfigError`` on an unknown option."""
    long_names = {"-h": "--help", "-c": "--cfg"}
    options: set[str] = set()
    overrides: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, _, value = argument.partition("=")
        name = long_names.get(name, name)
        if name == "--cfg":
            value = value or next(arguments, "")
            if value != "job":
                raise ConfigError(f"--cfg {value}: only `--cfg job` (print the resolved configuration) is known")
        # Hydra's --resolve belongs to --cfg, which always resolves here.
        elif name not in ("--help", "--help-all", "--resolve"):
            allowed = "--help, --help-all, --cfg job and key=value overrides"
            raise ConfigError(f"{argument}: unknown option; allowed are {allowed}")
        options.add(name)
    return options - {"--resolve"}, overrides


def part_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that Hydra takes, from those that a user writes.

    ``reduction.score=random`` or ``reduction.score={name: random, seed: 3}`` replaces the part, where Hydra would merge
    a mapping into what the files say: it becomes a text, which ``Registry.build`` reads. ``reduction.score.seed=3``
    then sets a key of it; alone, it changes a key of the part that the files chose, which they may not name (``++``).
    """
    result = list(overrides)
    for part in PARTS:
        key = f"reduction.{part}"
        own = [each for each in result if each.startswith((f"{key}=", f"{key}.")) and "=" in each]
        chosen: dict[str, Any] = {}
        for override in own:
            name, value = _parsed(override)
            if name == key:
                chosen = value if isinstance(value, dict) else {"name": value}
            elif chosen and name is not None:
                chosen[name[len(key) + 1 :]] = value
        if isinstance(chosen.get("name"), str) and set(chosen) != {"name"}:
            result = [each for each in result if each not in own]
            result.append(f"{key}='{json.dumps(chosen)}'")
        else:
            result = [f"++{each}" if each in own and each.startswith(f"{key}.") else each for each in result]
    return result


def import_named(overrides: Sequence[str]) -> None:
    """Imports the scores that a command line names by their dotted paths, which a stored file may name after that.

    Raises:
        ConfigError: one cannot be imported.
    """
    for override in overrides:
        name, value = _parsed(override)
        chosen = value.get("name") if isinstance(value, dict) else value
        for part, registry in PARTS.items():
            if name == f"reduction.{part}" and isinstance(chosen, str):
                registry.find(chosen)


def _parsed(override: str) -> tuple[str | None, Any]:
    """Key and value of an override; None where it cannot be read, which is said later."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return None, None
    return parsed.key_or_group, parsed.value()


def check_written(conf_dir: Path, config_name: str, overrides: Sequence[str]) -> None:
    """What the files of a composition say is what is read of them. Call it while Hydra is initialized.

    Args:
        config_name: file that the composition starts from, without its ending.

    Raises:
        ConfigError: naming the first value that is not.
    """
    files = GlobalHydra.instance().config_loader().compute_defaults_list(config_name, list(overrides), RunMode.RUN)
    for entry in files.defaults:
        file = conf_dir / f"{entry.config_path}.yaml"
        # Others are Hydra's own, or the schema.
        if file.is_file():
            _check_file(file, f"{entry.package}." if entry.package else "", str(file.relative_to(conf_dir.parent)))


def _check_file(file: Path, prefix: str, shown: str) -> None:
    # As it stands: what it refers to may be in another file.
    content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    read = dict(leaves(content))
    for name, text in _plain_scalars(yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)):
        kind, value = without_none(type_of_key(prefix + name)), read.get(name)
        if isinstance(value, int | float) and not _as_written(value, text, kind):
            fix = {bool: "write true or false", str: f"write {name}: '{text}'"}.get(kind, "use digits")
            raise fail(prefix + name, text, f"is read as {value} in {shown}", fix)


def _plain_scalars(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and text of every value in a mapping that is not quoted."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.style is None:
                yield f"{prefix}{name.value}", value.value
            else:
                yield from _plain_scalars(value, f"{prefix}{name.value}.")


def _as_written(value: float, text: str, kind: Any) -> bool:
    """Whether a number or switch that was read stands there for a reader too."""
    if kind is bool:
        return isinstance(value, bool) or value in (0, 1)
    if kind is str:
        return str(value) == text
    if kind is int and isinstance(value, int):
        # 010 is 8 in YAML, and 1:30 is 90.
        return text.replace("_", "").lstrip("+") == str(value)
    return True
