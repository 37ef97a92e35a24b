"""Every private or fragile use of megatron-core, Energon, Lightning, NeMo, transformers and torch's checkpoints.

An upgrade that breaks one fails here, by name, before it fails as something else in a run. Nothing is built. The
table is ``seams.txt``; ``test_every_private_use_is_listed`` looks for private names that it lacks.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.tracked import ROOT

PACKAGE = "hybridprune_megatron"
LIBRARIES = ("megatron", "lightning", "nemo", "transformers")
SHORT = {"mcore": "megatron.core", "energon": "megatron.energon"}
#: Private names of Python and torch that have meant the same for ten years.
OF_PYTHON = {"_abc_impl", "_exit", "_getframe", "_replace", "_version"}

TABLE = Path(__file__).with_name("seams.txt").read_text(encoding="ascii")


def found(what: str) -> Any:
    """The object that ``module:attribute.attribute`` names; the module, if there is no colon.

    Raises:
        AttributeError, ImportError: it is not there.
    """
    module, _, path = what.partition(":")
    thing: Any = importlib.import_module(module)
    for name in path.split(".") if path else ():
        thing = getattr(thing, name)
    return thing


def has(thing: Any, *names: str) -> str:
    """The names are attributes, or declared as such."""
    declared = {name for kind in getattr(thing, "__mro__", ()) for name in vars(kind).get("__annotations__", {})}
    return _missing((name for name in names if not hasattr(thing, name) and name not in declared), "attribute")


def takes(thing: Any, *names: str) -> str:
    """The names are parameters that can be given by keyword."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = {name for name, parameter in inspect.signature(thing).parameters.items() if parameter.kind in kinds}
    return _missing((name for name in names if name not in known), "parameter")


def in_order(thing: Any, *names: str) -> str:
    """The names are the first positional parameters, apart from ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(thing).parameters.items()
    first = tuple(name for name, parameter in parameters if parameter.kind in kinds and name != "self")[: len(names)]
    return "" if first == names else f"takes {' '.join(first)} first, not {' '.join(names)}"


def stores(thing: Any, *names: str) -> str:
    """The names are fields of a dataclass."""
    known = {field.name for field in fields(thing)}
    return _missing((name for name in names if name not in known), "field")


def stores_only(thing: Any, *names: str) -> str:
    """The names are all fields of a dataclass."""
    known = tuple(field.name for field in fields(thing))
    return "" if known == names else f"has the fields {' '.join(known)}, not {' '.join(names)}"


def stores_one_of(thing: Any, *names: str) -> str:
    """One of the names, and no other of them, is a field of a dataclass."""
    count = sum(field.name in names for field in fields(thing))
    return "" if count == 1 else f"has {count} of the fields {' '.join(names)}, not 1"


def lacks(thing: Any, *names: str) -> str:
    """None of the names is an attribute or a field of a dataclass."""
    known = {*dir(thing), *(field.name for field in fields(thing))}
    taken = [name for name in names if name in known]
    return f"has an attribute {' '.join(taken)} of its own by now" if taken else ""


def says(thing: Any, *texts: str) -> str:
    """The texts stand in the source, however it is broken into lines."""
    source = _one_line(inspect.getsource(thing))
    return _missing((repr(text) for text in texts if _one_line(text) not in source), "source")


def reads_only(thing: Any, *names: str) -> str:
    """A method asks nothing else of ``self`` and of ``self.config`` (names with a dot) than the names."""
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    read = (ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute))
    asked = {text.removeprefix("self.") for text in read if re.fullmatch(r"self\.(config\.)?\w+", text)}
    more = sorted(asked - set(names))
    return f"reads self.{', self.'.join(more)} by now" if more else ""


def _one_line(text: str) -> str:
    return "".join(text.split()).replace('"', "'").replace(",)", ")")


def _missing(names: Any, kind: str) -> str:
    absent = list(names)
    return f"has no {kind} {', '.join(absent)}" if absent else ""


CHECKS = {
    check.__name__: check
    for check in (has, takes, in_order, stores, stores_only, stores_one_of, lacks, says, reads_only)
}


class Seam(NamedTuple):
    """A line of the table."""

    file: str
    why: str
    what: str
    check: str
    given: str

    def problem(self) -> str:
        """What is wrong; empty if nothing."""
        given = [self.given] if self.check == "says" else self.given.split()
        try:
            wrong = CHECKS[self.check](found(self.what), *given)
        except (ImportError, AttributeError) as error:
            wrong = f"is gone ({error})"
        return f"{self.what} {wrong}; {PACKAGE}'s {self.file} relies on it: {self.why}" if wrong else ""


def seams() -> Iterator[Seam]:
    """The table, line by line."""
    file = why = ""
    # What is before the first file is a note.
    for line in TABLE[TABLE.index("\n[") :].replace("\n  ", " ").splitlines():
        if line.startswith("["):
            file = line.strip("[]")
        elif line.startswith("# "):
            why = line.removeprefix("# ")
        elif line:
            what, check, given = line.split(maxsplit=2)
            module, _, name = what.partition(":")
            first, dot, rest = module.partition(".")
            yield Seam(file, why, f"{SHORT.get(first, first)}{dot}{rest}:{name}".rstrip(":"), check, given)


def case(seam: Seam) -> Any:
    """Named by the last two names of what it looks at."""
    return pytest.param(seam, id=f"{'.'.join(re.split('[.:]', seam.what)[-2:])}-{seam.check}")


@pytest.mark.parametrize("seam", [case(seam) for seam in seams()])
def test_seam(seam: Seam) -> None:
    problem = seam.problem()
    assert not problem, problem


def test_the_table_names_files_that_rely_on_it() -> None:
    for seam in seams():
        path = ROOT / seam.file if seam.file.startswith("recipes/") else ROOT / PACKAGE / seam.file
        names = re.findall(r"\w+", f"{seam.what.rpartition(':')[2].partition('.')[0]} {seam.given}")
        source = path.read_text(encoding="ascii")
        assert any(len(name) > 3 and name in source for name in names), seam


def test_every_private_use_is_listed() -> None:
    listed = set(re.findall(r"\w+", TABLE))
    used = {**dict(private_names_in_source()), **dict(overridden_private_names())}
    assert {"_split_tensor_factory", "_set_cuda_rng_state", "_communicate", "_configure_launcher"} <= set(used)
    missing = {name: where for name, where in used.items() if name not in listed | OF_PYTHON}
    assert not missing, f"add to the table, with the reason: {missing}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names_in_source() -> Iterator[tuple[str, str]]:
    """Private names that are imported or read, and are none of our own; and the places."""
    files = [path for part in (PACKAGE, "recipes", "scripts") for path in sorted((ROOT / part).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="ascii")) for path in files}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for _, node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for path, node in nodes:
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE):
            names = [alias.name for alias in node.names]
        yield from ((name, f"{path.name}:{node.lineno}") for name in names if private(name) and name not in own)


def overridden_private_names() -> Iterator[tuple[str, str]]:
    """Private names of a library's class that a class of ours has too; and our classes."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if not re.search(rf"^from ({'|'.join(LIBRARIES)})\b", path.read_text(encoding="ascii"), re.MULTILINE):
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            theirs = [base for base in kind.__mro__[1:] if base.__module__.partition(".")[0] in LIBRARIES]
            for name in filter(private, vars(kind)):
                if any(name in vars(base) or name in getattr(base, "__annotations__", {}) for base in theirs):
                    yield name, f"{module.__name__}.{kind.__name__}"


@dataclass
class Library:
    """As it was."""

    first: int = 0
    second: int = 0

    def run(self, one: int, two: int, *, three: int = 0) -> int:
        return self.first + one + three


class Upgrade(make_dataclass("Upgrade", [("first", int), ("other", int)])):  # type: ignore[misc]
    """As an upgrade may leave it."""

    scores = None

    def run(self, two: int, one: int, **more: int) -> int:
        return self.device + self.first + two


@pytest.mark.parametrize(
    ("check", "what", "given", "problem"),
    [
        ("has", ":Library", "run second", "has no attribute second"),
        ("takes", ":Library.run", "three two", "has no parameter three"),
        ("in_order", ":Library.run", "one two", "takes two one first, not one two"),
        ("stores", ":Library", "first second", "has no field second"),
        ("stores_only", ":Library", "first second", "has the fields first other, not first second"),
        ("stores_one_of", ":Library", "second third", "has 0 of the fields second third, not 1"),
        ("lacks", ":Library", "layout scores", "has an attribute scores of its own by now"),
        ("says", ":Library.run", "return self.first+ one", "has no source 'return self.first+ one'"),
        ("reads_only", ":Library.run", "first second", "reads self.device by now"),
        ("has", ":Library.run", "__call__", "is gone"),
        ("has", "", "Library", "has no attribute Library"),
    ],
)
def test_every_check_fails_after_an_upgrade(
    monkeypatch: pytest.MonkeyPatch, check: str, what: str, given: str, problem: str
) -> None:
    seam = Seam("models/stack.py", "it is tried", __name__ + what, check, given)
    assert not seam.problem()
    if problem == "is gone":
        monkeypatch.delattr(Library, "run")
    elif not what:
        monkeypatch.delattr(f"{__name__}.Library")
    else:
        monkeypatch.setattr(f"{__name__}.Library", Upgrade)
    assert seam.problem().startswith(f"{seam.what} {problem}")
    assert seam.problem().endswith("; hybridprune_megatron's models/stack.py relies on it: it is tried")


def test_every_check_is_tried_and_used() -> None:
    tried = {values[0] for mark in test_every_check_fails_after_an_upgrade.pytestmark for values in mark.args[1]}
    assert tried == set(CHECKS) == {seam.check for seam in seams()}


def test_a_module_that_is_gone_fails_by_its_name() -> None:
    problem = Seam("models/stack.py", "it is tried", "megatron.core.not_there:Thing", "has", "name").problem()
    assert problem.startswith("megatron.core.not_there:Thing is gone (No module named")
