"""A GPU package that is installed and cannot be imported is one line with the fix, not a traceback from its inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridprune_megatron.config.one_line import USER_ERROR, broken_package, one_line_errors
from hybridprune_megatron.models import specs


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Transformer Engine as it is beside another torch: its Python, whose library does not load."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("def load():\n    raise OSError('undefined symbol: _ZN3c105')\n\nload()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield package
    forget()


def forget() -> None:
    """The package is imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_its_import_ends_a_program_in_one_line(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors("finetune")
    def main() -> None:
        import transformer_engine.pytorch  # noqa: F401

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == USER_ERROR
    assert capsys.readouterr().err == (
        "hybridprune finetune: transformer_engine is installed and cannot be imported (OSError: undefined symbol: "
        "_ZN3c105): `make setup-gpu` compiles it for the torch that is here, `pip uninstall transformer-engine` leaves "
        "plain torch (model.spec=torch)\n"
    )


def test_an_error_of_its_functions_is_not_taken_for_it(broken: Path) -> None:
    (broken / "__init__.py").write_text("def call():\n    raise OSError('no')\n")
    import transformer_engine.pytorch as engine

    with pytest.raises(OSError, match="no") as raised:
        engine.call()
    assert broken_package(raised.value) is None


@pytest.mark.parametrize("name", ["te", "auto"])
def test_megatron_taking_it_for_not_installed_is_seen(broken: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (broken / "__init__.py").write_text("raise ImportError('libcudnn.so.9')\n")
    monkeypatch.setattr(specs, "missing_gpu_packages", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^model\.spec=te: transformer_engine is installed and cannot be .*libcudnn"):
        specs.resolve_spec(name)
