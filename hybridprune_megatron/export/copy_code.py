"""Copies the modelling code into an export: the modules it needs, flat, importing each other relatively.

The export is self-contained, and nothing is written twice: the files are this package's own. transformers imports a
folder's code as one flat package and follows ``from .module import name`` lines by itself.
"""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = "hybridprune_megatron"
_ROOT = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(rf"^(\s*)from {_PACKAGE}\.([\w.]+) import ", flags=re.MULTILINE)
_ANY_IMPORT = re.compile(rf"^\s*(?:import|from)\s+{_PACKAGE}\b", flags=re.MULTILINE)
_ENTRY_MODULES = (
    "export.configuration_hybridprune",
    "export.modeling_hybridprune",
    "export.processing_hybridprune",
)


def needed_modules() -> list[str]:
    """The modules of the export and all modules they import, as dotted names inside the package, sorted."""
    found: set[str] = set()
    waiting = list(_ENTRY_MODULES)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [match.group(2) for match in _IMPORT.finditer(_source(module))]
    return sorted(found)


def relative_source(module: str) -> str:
    """A module's source with the package's imports made relative and flat.

    Raises:
        ValueError: an import of the package in a form that is not rewritten.
    """
    text = _IMPORT.sub(lambda match: f"{match.group(1)}from .{match.group(2).split('.')[-1]} import ", _source(module))
    left = _ANY_IMPORT.search(text)
    if left is not None:
        raise ValueError(
            f"{module} has {left.group().strip()!r}: write `from {_PACKAGE}.x.y import name` in exported code"
        )
    return text


def copy_code(folder: Path) -> list[str]:
    """Writes the code into a folder.

    Returns:
        The names of the files.

    Raises:
        ValueError: two modules would get the same file name, or see ``relative_source``.
    """
    modules = needed_modules()
    names = [module.split(".")[-1] for module in modules]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"exported modules share the file name {sorted(twice)[0]}.py: rename one of them")
    for module, name in zip(modules, names):
        (folder / f"{name}.py").write_text(relative_source(module), encoding="ascii")
    return [f"{name}.py" for name in names]


def _source(module: str) -> str:
    return (_ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="ascii")
