"""What foreign input is thrown at: a small model with its run's folder, and Hugging Face folders of twins."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from megatron.core import dist_checkpointing

from hybridprune_megatron.config.flat import plain_config
from tests.export.conftest import make_config, make_model, tokenizer_dir  # noqa: F401  # the last is a fixture

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, folder: str = "scripts") -> ModuleType:
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest, links as what they say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


Refused = Callable[[Callable[[], Any]], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a program that has to end with code 1 or 2 and one line, and returns the line."""

    def run(main: Callable[[], Any]) -> str:
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        if isinstance(ended.value.code, str):
            said, code = f"{ended.value.code}\n", 1
        else:
            code = ended.value.code
        assert code in (1, 2), ended.value
        # argparse says how it is used before its line; progress bars end in a return.
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip() and "it/s]" not in line]
        last = lines[-1]
        assert all(line.startswith(("usage:", " ")) for line in lines[:-1]), said
        assert len(last) < 1200, last
        return last

    return run


@pytest.fixture(scope="session")
def tiny(tokenizer_dir: Path) -> SimpleNamespace:  # noqa: F811
    """A model of a few thousand weights (``model``) and its configuration (``cfg``)."""
    cfg = make_config(tokenizer_dir)
    return SimpleNamespace(cfg=cfg, model=make_model(cfg))


@pytest.fixture(scope="session")
def saved_run(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint. Tests change copies of it."""
    from hybridprune_megatron.engine.checkpoint import SHARDED_FORMAT

    run = tmp_path_factory.mktemp("run")
    step = run / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    state = {"model": tiny.model.sharded_state_dict(metadata=dict(SHARDED_FORMAT)), "step": 10}
    dist_checkpointing.save(state, str(step))
    # Without the sizes of its files, which whoever changes a file changes too.
    header = {"step": 10, "config": plain_config(tiny.cfg), "layout": {}}
    (step / "run.json").write_text(json.dumps(header))
    return run


@pytest.fixture
def run_dir(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders: a language model, one without Mamba layers, one with experts, a video model, a tower."""
    from tests.parity.twins import radio_twin, write_language_twin, write_vision_twin

    root = tmp_path_factory.mktemp("twins")
    write_language_twin(root / "language", "one group, one key-value head")
    write_language_twin(root / "attention", "no Mamba, another epsilon")
    write_language_twin(root / "experts", "experts")
    write_vision_twin(root / "video")
    radio_twin().save_pretrained(root / "radio")
    return {name: root / name for name in ("language", "attention", "experts", "video", "radio")}


@pytest.fixture
def refused_import(refused: Refused, tmp_path: Path) -> Callable[..., str]:
    """Imports a changed copy of a folder, which has to end in one line and write nothing."""

    def call(source: Path, change: Callable[[Path], Any], *more: str) -> str:
        folder = Path(shutil.copytree(source, tmp_path / "hf"))
        change(folder)
        before = contents(tmp_path)
        arguments = [str(folder), "--name", "twin", "--out", str(tmp_path / "out"), "--conf", str(tmp_path), *more]
        (tmp_path / "model").mkdir()
        line = refused(lambda: script("import_hf").main(arguments))
        (tmp_path / "model").rmdir()
        assert contents(tmp_path) == before
        assert "Traceback" not in line
        return line

    return call
