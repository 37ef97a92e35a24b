"""One door to the commands, in a checkout and from a wheel without one."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hybridprune_megatron.commands import door
from hybridprune_megatron.config.shipped import CONF_DIR, HOME, shipped_path
from scripts.make_demo_data import main as make_demo_data
from tests.own_time import HANG_SECONDS
from tests.tracked import ROOT, tracked

#: What stays as a file of its own for who calls it by its path.
FILES = {
    "recipes": {"analyze": "analyze", "benchmark": "benchmark", "finetune": "finetune", "plan": "plan"},
    "scripts": {
        "ask": "ask",
        "export_hf": "export",
        "import_hf": "import",
        "make_shards": "shards",
        "precompute_features": "features",
    },
}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    door.main(argv)
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in door.COMMANDS.items():
        assert [line for line in lines if line.split() == [name, *text.split()]], name
    assert max(map(len, lines)) <= 120


def test_the_door_knows_every_module() -> None:
    folder = Path(door.__file__).parent
    assert {module for module, _ in door.COMMANDS.values()} == {
        path.stem for path in folder.glob("*.py") if path.name not in ("__init__.py", "door.py")
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fintune", "did you mean finetune?"),
        ("Plan", "did you mean plan?"),
        ("exports", "did you mean export?"),
        ("--plan", "did you mean plan?"),
        ("experiment=demo", "hybridprune --help explains them"),
        ("", "hybridprune --help explains them"),
        ("x\ny" * 1000, "hybridprune --help explains them"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        door.main([name, "--help"])
    said = capsys.readouterr().err
    assert said.startswith("hybridprune: ")
    assert f"unknown command; allowed are {', '.join(door.COMMANDS)}; {hint}\n" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", door.COMMANDS)
def test_every_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hybridprune"])
    # argparse and the configuration end the program after their help, the planner returns.
    with suppress(SystemExit):
        door.main([name, "--help"])
    text = capsys.readouterr().out
    assert f"hybridprune {name} " in text
    assert f"python {'recipes'}/" not in text
    assert "scripts/export_hf.py" not in text


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder, names in FILES.items() for name in names])
def test_the_documented_files_are_the_same_functions(folder: str, name: str) -> None:
    module, _ = door.COMMANDS[FILES[folder][name]]
    command = importlib.import_module(f"hybridprune_megatron.commands.{module}")
    assert importlib.import_module(f"{folder}.{name}").main is command.main


@pytest.mark.parametrize("name", door.COMMANDS)
def test_every_error_has_one_prefix(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hybridprune"])
    with pytest.raises(SystemExit, match="2"):
        door.main([name, "nonsense=1", "--no-such-option", "x"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"hybridprune {name}: ")
    assert not list(tmp_path.iterdir())


def test_the_demo_s_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "assets/demo/base.safetensors"
    monkeypatch.chdir(tmp_path)
    assert shipped_path(name) == str(HOME / name)
    assert shipped_path("assets/none") == "assets/none"
    assert shipped_path("conf/config.yaml") == "conf/config.yaml"
    # The user's own of this name comes first.
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    (tmp_path / name).touch()
    assert shipped_path(name) == name


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel of this checkout was installed into, by nothing but pip and setuptools."""
    root = tmp_path_factory.mktemp("wheel")
    # setuptools leaves files next to what it builds from.
    for path in tracked():
        target = root / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", *offline, "--wheel-dir", root, root / "source"],
        check=True,
        timeout=HANG_SECONDS,
    )
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", root / "site", wheel], check=True, timeout=HANG_SECONDS)
    shutil.rmtree(root / "source")
    return root / "site"


def test_a_wheel_works_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    here = {path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml")}
    conf = installed / "hybridprune_megatron" / "conf"
    assert {path.relative_to(conf) for path in conf.rglob("*.yaml")} == here
    assert not (installed / "conf").exists()
    environment = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hybridprune_megatron.commands.door", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--help").startswith("usage: hybridprune <command>")
    planned = run("plan", "experiment=nemotron_nano_12b_v2_vl", "target.speedup=4").splitlines()
    assert planned[-1].startswith("reduction.budget=0.")
    make_demo_data(f"--out {tmp_path}/data --train 8 --validation 2 --frames 16 --fps 2 --workers 1".split())
    data = [f"data.train={tmp_path}/data/train", f"data.validation={tmp_path}/data/validation"]
    run("finetune", "experiment=demo", *data, "trainer.max_steps=2", "trainer.eval_samples=0", "output_dir=run")
    written = json.loads((tmp_path / "run" / "checkpoints" / "step_00000002" / "run.json").read_text())
    assert written["config"]["data"]["tokenizer"] == f"{conf.parent}/assets/demo/tokenizer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    program = (installed / "bin" / "hybridprune").read_text()
    assert "from hybridprune_megatron.commands.door import run" in program
