"""Values in files of ``conf/`` that are read as something else than is written: YAML makes 1.1 of ``name: 1.10``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # the package ships no types
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.fields import type_of_key, without_none
from hybridprune_megatron.config.flat import leaves


def check_written(conf_dir: Path, config_name: str, overrides: Sequence[str]) -> None:
    """What the files of a composition say is what is read of them. Call it while Hydra is initialized.

    Args:
        conf_dir: the folder of the configuration groups.
        config_name: file that the composition starts from, without its ending.
        overrides: of the composition.

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
