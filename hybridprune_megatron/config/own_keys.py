"""Keys of a command besides those of the configuration: the fields of a dataclass, given as ``key=value`` too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Protocol

from hybridprune_megatron.bounds import read_value
from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.data_sets import read_data_sets
from hybridprune_megatron.config.fields import field_help
from hybridprune_megatron.config.files import check_dataset
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.config.stored_export import export_config, is_export
from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint
from hybridprune_megatron.config.stores import local, located


def read_own_keys[T](kind: type[T], overrides: Sequence[str]) -> tuple[T, list[str]]:
    """A command's own keys from the command line, and what is left for the configuration.

    Args:
        kind: a dataclass; a field without a default must be given.
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: one line on what is wrong.
    """
    known = _fields(kind)
    own = [override for override in overrides if override.partition("=")[0] in known]
    rest = [override for override in overrides if override not in own]
    given = {override.partition("=")[0] for override in own}
    for name, default in known.items():
        if default is MISSING and name not in given:
            raise fail(name, None, "must be set", f"give {name}=<path>")
    texts = (override.partition("=") for override in own)
    return kind(**{name: read_value(name, text, kind, name) for name, _, text in texts}), rest


def own_keys_help(kind: type) -> str:
    """A line per key, from the Attributes section of the dataclass."""
    known = _fields(kind)
    defaults = {name: "" if value is MISSING or value is None else f" [{value}]" for name, value in known.items()}
    width = max(map(len, defaults)) + 2
    return "\n".join(f"  {name:<{width}}{field_help(kind, name)}{default}" for name, default in defaults.items())


class CheckpointKeys(Protocol):
    """The own keys of a command that looks at a checkpoint."""

    checkpoint: str
    data: str | None


def read_checkpoint_command[T: CheckpointKeys](
    command: str, about: str | None, kind: type[T], argv: Sequence[str], split: str = "validation"
) -> tuple[T, Path, Config, Path]:
    """The command line of a command that looks at a checkpoint; nothing slow is imported.

    Args:
        about: text of ``--help``, in which {keys} stands for the own keys.
        kind: dataclass of these.
        split: of the configuration's data, where the command line names none.

    Returns:
        Own keys, checkpoint, its configuration as changed, folder of the data set.

    Raises:
        ValueError: one line on what is wrong.
    """
    settings, overrides = read_command_line(command, about, kind, argv)
    checkpoint = find_checkpoint(settings.checkpoint)
    cfg = checkpoint_config(checkpoint, overrides)
    return settings, checkpoint, cfg, data_folder(settings.data, getattr(cfg.data, split))


def read_command_line[T](command: str, about: str | None, kind: type[T], argv: Sequence[str]) -> tuple[T, list[str]]:
    """Own keys of a command, and what is left for the configuration; ``--help`` prints the keys and ends.

    Args:
        about: text of ``--help``, in which {keys} stands for the own keys.
        kind: dataclass of these.

    Raises:
        ConfigError: one line on what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"hybridprune {command}",
        description=(about or "").format(keys=own_keys_help(kind)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys above, or of the configuration")
    return read_own_keys(kind, parser.parse_args(argv).overrides)


def checkpoint_or_export(path: str, overrides: Sequence[str]) -> tuple[Path, Config, bool]:
    """The model that a path means, and its configuration for one process.

    Args:
        path: a checkpoint as ``find_checkpoint`` takes it, or a folder that ``hybridprune export`` wrote.
        overrides: changes to its configuration; with bare weights they compose it.

    Returns:
        The checkpoint or the export, its configuration, whether it is an export.

    Raises:
        ValueError: there is neither, or a key or value the schema refuses.
    """
    if is_export(path):
        return Path(path), export_config(Path(path), overrides), True
    checkpoint = find_checkpoint(path)
    return checkpoint, checkpoint_config(checkpoint, overrides), False


def check_paths(**paths: str | None) -> None:
    """Files and folders that keys name are there.

    Args:
        paths: by key; None: not given.

    Raises:
        ConfigError: naming the key.
    """
    for name, path in paths.items():
        if path is not None and not Path(path).exists():
            raise fail(name, path, f"is not there (looked from {Path.cwd()})", f"set {name} to a file or folder")


def data_folder(data: str | None, otherwise: str | None) -> Path:
    """The data set to look at.

    Args:
        data: what the user named.
        otherwise: taken where that is None.

    Raises:
        ConfigError: there is none.
    """
    folder = data or otherwise
    if folder is not None:
        local(located(folder, "data"), "data")
    if folder is None or not Path(folder).is_dir():
        raise ConfigError(f"data={folder}: is not a folder (looked from {Path.cwd()}); give data=<folder with shards>")
    check_dataset("data", Path(folder))
    return Path(folder)


def data_path(data: str | None, otherwise: str | None) -> Path:
    """As ``data_folder``, and the .yaml of a blend too.

    Raises:
        ConfigError: there is none, or one of its parts cannot be read.
    """
    path = data or otherwise
    if path is None or not Path(path).is_file():
        return data_folder(data, otherwise)
    check_dataset("data", Path(path))
    read_data_sets(path, "val", "data")
    return Path(path)


def _fields(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}
