"""Copies the modelling code into an export: the modules it needs, flat, importing each other relatively.

The export is self-contained, and nothing is written twice: the files are this package's own, and the file of a score
that is somebody else's. transformers imports a folder's code as one flat package and follows ``from .module import
name`` lines by itself.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

from hybridprune_megatron.method.scorer import Score

_PACKAGE = "hybridprune_megatron"
_ROOT = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(rf"^(\s*)from {_PACKAGE}\.([\w.]+) import ", flags=re.MULTILINE)
_ANY_IMPORT = re.compile(rf"^\s*(?:import|from)\s+{_PACKAGE}\b", flags=re.MULTILINE)
_ENTRY_MODULES = ("export.configuration_hybridprune", "export.modeling_hybridprune", "export.processing_hybridprune")
#: The module that an export which brings a score along has another version of.
_ANNOUNCED = "method.announced"


def needed_modules(further: str = "") -> list[str]:
    """The modules of the export and all modules they import, as dotted names inside the package, sorted.

    Args:
        further: source that is exported as well.
    """
    found: set[str] = set()
    waiting = [*_ENTRY_MODULES, *(match.group(2) for match in _IMPORT.finditer(further))]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [match.group(2) for match in _IMPORT.finditer(_source(module))]
    return sorted(found)


def relative_source(module: str, text: str | None = None) -> str:
    """A module's source with the package's imports made relative and flat.

    Args:
        text: its source; None: of a module of this package.

    Raises:
        ValueError: an import of the package in a form that is not rewritten.
    """
    text = _source(module) if text is None else text
    text = _IMPORT.sub(lambda match: f"{match.group(1)}from .{match.group(2).split('.')[-1]} import ", text)
    left = _ANY_IMPORT.search(text)
    if left is not None:
        raise ValueError(
            f"{module} has {left.group().strip()!r}: write `from {_PACKAGE}.x.y import name` in exported code"
        )
    return text


def copy_code(folder: Path, score: Score | None = None) -> list[str]:
    """Writes the code into a folder.

    Args:
        score: what it ranks by; the file of one that is not ours goes along.

    Returns:
        The names of the files.

    Raises:
        ValueError: two modules would get the same file name, or see ``relative_source`` and ``_source_of``.
    """
    sources: dict[str, str] = {}
    own = score is None or type(score).__module__.partition(".")[0] == _PACKAGE
    brought = "" if score is None or own else _source_of(type(score))
    for module in needed_modules(brought):
        name = module.split(".")[-1]
        if name in sources:
            raise ValueError(f"exported modules share the file name {name}.py: rename one of them")
        sources[name] = relative_source(module)
    if score is not None and not own:
        module = type(score).__module__
        name = module.split(".")[-1]
        if name in sources:
            raise ValueError(f"{module}: the export has a {name}.py of its own; give the score's file another name")
        sources[name] = relative_source(module, brought)
        sources[_ANNOUNCED.split(".")[-1]] = _announcement(name, type(score))
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return [f"{name}.py" for name in sources]


def _source_of(kind: type[Score]) -> str:
    """The file of somebody else's score.

    Raises:
        ValueError: it imports from its own package, which the export does not have.
    """
    text = inspect.getsource(sys.modules[kind.__module__])
    package = kind.__module__.partition(".")[0]
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            # A relative import is of its package.
            names.append(package if node.level else node.module or "")
        if package in (name.partition(".")[0] for name in names):
            raise ValueError(
                f"reduction.score={kind.name}: its file imports from its own package, {package}, and an export copies "
                "this one file only; put what the score needs into it"
            )
    return text


def _announcement(module: str, kind: type[Score]) -> str:
    return (
        '"""The score that this export brings along."""\n\n'
        f"from .{module} import {kind.__name__}\n"
        "from .scorer import Score\n\n"
        f"{kind.__name__}.name = {kind.name!r}\n"
        f"ANNOUNCED: tuple[type[Score], ...] = ({kind.__name__},)\n"
    )


def _source(module: str) -> str:
    return (_ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="ascii")
