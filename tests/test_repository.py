"""What the repository as a whole promises: import direction, small files, no traces of a machine."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.site import OUTSIDE, with_links
from tests.tracked import ROOT, tracked

PACKAGE = "hybridprune_megatron"

#: Modules that stand by themselves: every package may import them, and they import none.
BASE = {"checks", "bounds", "plugins"}
#: What every package may import of this project besides; everything else is refused.
ALLOWED: dict[str, set[str]] = {
    "layers": set(),
    "method": {"ops", "layers"},
    "ops": set(),
    "config": {"method", "layers"},
    "cost": {"method", "layers", "config"},
    "data": {"method", "config"},
    "models": {"layers", "method", "ops", "data", "config"},
    "evaluation": {"layers", "method", "data", "config", "models", "engine", "export"},
    "analysis": {"layers", "method", "ops", "data", "config", "cost", "models", "evaluation"},
    "huggingface": {"layers", "method", "config"},
    "engine": {"layers", "method", "data", "config", "models", "huggingface"},
    "commands": {
        *("data", "config", "cost", "models", "huggingface"),
        *("evaluation", "analysis", "engine", "export"),
    },
    "export": {"layers", "method", "ops", "data", "config", "models", "engine", "huggingface"},
}
#: Packages outside this project that a package must not import, not even inside a function.
FORBIDDEN: dict[str, set[str]] = {
    "method": {"megatron", "transformers", "lightning", "nemo"},
    "ops": {"megatron", "transformers", "lightning", "nemo"},
    "layers": {"torch", "megatron", "transformers", "lightning", "nemo"},
    "config": {"torch", "megatron", "transformers", "lightning", "nemo"},
    "cost": {"torch", "megatron", "transformers", "lightning", "nemo"},
    "models": {"lightning", "nemo"},
    "huggingface": {"megatron", "lightning", "nemo", "transformers"},
    "evaluation": {"lightning", "nemo", "transformers"},
    "analysis": {"lightning", "nemo", "transformers"},
}
MOST_LINES = 400
MOST_BYTES = 10 * 2**20


def text_files() -> list[Path]:
    return [path for path in tracked() if b"\0" not in path.read_bytes()[:8192]]


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import of {node.module}"
            assert node.module is not None, path
            names.add(node.module)
            # "from package import module" names a module too.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_package_has_a_rule():
    packages = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_one_way(package):
    for path in (ROOT / PACKAGE / package).rglob("*.py"):
        for name in imported_modules(path):
            parts = name.split(".")
            assert parts[0] not in FORBIDDEN.get(package, set()), f"{path} imports {name}"
            assert parts[0] not in {"recipes", "scripts", "studies", "tests"}, f"{path} imports {name}"
            if parts[0] == PACKAGE and len(parts) > 1:
                assert parts[1] in ALLOWED[package] | BASE | {package}, f"{path} imports {name}"


@pytest.mark.parametrize("module", sorted(BASE))
def test_modules_that_stand_by_themselves_do(module):
    for name in imported_modules(ROOT / PACKAGE / f"{module}.py"):
        parts = name.split(".")
        assert parts[0] not in FORBIDDEN["layers"], name
        assert parts[0] != PACKAGE or len(parts) == 1 or parts[1] in BASE, name


def check_no_circle(imported: Mapping[str, set[str]]) -> None:
    """Takes away what imports nothing that is left, until nothing is left."""
    left = dict(imported)
    while left:
        leaves = {name for name, names in left.items() if not names & set(left)}
        assert leaves, f"a circle among {sorted(left)}"
        left = {name: names for name, names in left.items() if name not in leaves}


def test_allowed_imports_have_no_cycle():
    check_no_circle(ALLOWED)


def test_no_modules_import_each_other():
    """Imports for type checkers and those inside of functions count too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / PACKAGE).rglob("*.py")}
    check_no_circle({name: (imported_modules(path) & set(paths)) - {name} for name, path in paths.items()})


def test_python_files_are_ascii_and_not_too_long():
    for path in tracked():
        if path.suffix == ".py":
            text = path.read_text(encoding="ascii")
            assert len(text.splitlines()) <= MOST_LINES, path


def test_no_large_file_is_tracked():
    for path in tracked():
        assert path.stat().st_size <= MOST_BYTES, path


def test_no_machine_paths():
    # A path below a home, a mount or a workplace; examples in the documentation use other names.
    machine = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|scratch)/[\w.]+")
    for path in text_files():
        found = machine.search(path.read_text(errors="replace"))
        assert found is None, f"{path}: {found.group()}"


def test_nothing_is_unpickled():
    # The reader of checkpoint indices subclasses the unpickler to make stand-ins of the index's own types only.
    reader = ROOT / PACKAGE / "engine" / "checkpoint_index.py"
    for path in tracked():
        if path.suffix == ".py" and PACKAGE in path.parts and path != reader:
            assert "pickle" not in imported_modules(path), path
            assert "weights_only=False" not in path.read_text(), path


def test_readme_names_every_folder():
    readme = (ROOT / "README.md").read_text()
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if len(path.relative_to(ROOT).parts) > 1}
    packages = {f"{PACKAGE}/{package}" for package in ALLOWED}
    for folder in sorted(({*folders} - {PACKAGE, ".ci", ".github"}) | packages):
        assert f"| `{folder}/` |" in readme, folder


def test_links_between_pages_lead_somewhere():
    pages = [path for path in tracked() if path.suffix == ".md"]
    assert len(pages) > 10
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_site_leads_to_every_page():
    """Its links are checked by `make docs`, which mkdocs ends where one leads nowhere."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    start, *groups = site["nav"]
    shown = [*start.values(), *(page for group in groups for pages in group.values() for page in pages)]
    written = {path.name for path in tracked() if path.suffix == ".md" and path.parent == ROOT / "docs"}
    assert sorted(shown) == sorted(written | OUTSIDE.keys())


def test_links_of_a_page_lead_to_pages_of_the_site():
    assert with_links("[a](docs/data.md#tables), [b](CHANGELOG.md), [c](docs/study/x.png), [d](#here)", "..") == (
        "[a](data.md#tables), [b](changes.md), [c](study/x.png), [d](#here)"
    )
    assert with_links("[a](../README.md#layout), [b](data.md), [c](https://x.org/y)", "") == (
        "[a](index.md#layout), [b](data.md), [c](https://x.org/y)"
    )


def test_readme_shows_the_committed_report():
    from scripts.fill_readme import README, filled

    assert filled(README.read_text()) == README.read_text(), "run python scripts/fill_readme.py"


def test_the_lock_has_what_pyproject_asks_for():
    locked = dict(
        re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / "requirements" / "dev.lock").read_text(), flags=re.MULTILINE)
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = (
        project["project"]["dependencies"] + extras["eval"] + extras["dev"] + project["dependency-groups"]["lmms-eval"]
    )
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["project"]["name"]:
            assert name in locked, f"{name} is not in requirements/dev.lock: run make lock"
            assert requirement.specifier.contains(locked[name]), f"{requirement}, locked {locked[name]}: run make lock"


@pytest.mark.parametrize("lock", ["build", "dev", "newest"])
def test_every_locked_version_has_hashes(lock):
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if entry.strip() and not entry.startswith("#"):
            assert re.match(r"[a-z0-9._\[\]-]+==\S+ \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+$", entry), entry[:200]


def test_failures_name_tests_that_exist() -> None:
    """A row's ``::name`` is of the file that is named last before it."""
    source = ""
    for name, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs" / "cluster.md").read_text()):
        source = (ROOT / name).read_text() if name else source
        assert f"def {test}" in source
