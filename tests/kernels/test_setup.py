"""The build chooses CUDA only where it would succeed, and says in one line why it does not."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kernels.emulation import ROOT

_SETUP = ROOT / "kernels" / "setup.py"


@pytest.fixture
def setup() -> SimpleNamespace:
    """What kernels/setup.py defines, without the call that builds."""
    tree = ast.parse(_SETUP.read_text())
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    names: dict[str, Any] = {"__file__": str(_SETUP), "__name__": "setup"}
    exec(compile(tree, str(_SETUP), "exec"), names)
    names["torch"] = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="13.0"))
    return SimpleNamespace(names=names)


def fake_toolkit(folder: Path, version: str) -> Path:
    """A CUDA toolkit of which there is only an nvcc that says its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.93'\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(("version", "wanted"), [("13.0", True), ("13.2", True), ("12.8", False)])
def test_a_toolkit_of_another_major_version_is_not_taken(
    setup, tmp_path, monkeypatch, capsys, version: str, wanted: bool
) -> None:
    home = fake_toolkit(tmp_path / "cuda", version)
    monkeypatch.delenv("HYBRIDPRUNE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup.names["wants_cuda"]() is wanted
    said = capsys.readouterr().err.splitlines()
    if wanted:
        assert not said
        return
    reason = f"nvcc of {home} is of CUDA 12.8 and torch is built for CUDA 13.0 (CUDA_HOME names another toolkit)"
    assert said == [f"hybridprune-kernels: building for the CPU only: {reason}"]
    monkeypatch.setenv("HYBRIDPRUNE_CUDA", "1")
    with pytest.raises(SystemExit) as stopped:
        setup.names["wants_cuda"]()
    assert stopped.value.code == f"HYBRIDPRUNE_CUDA=1, but {reason}"


def test_an_nvcc_on_the_path_is_asked_for_its_version(setup, tmp_path, monkeypatch, capsys) -> None:
    home = fake_toolkit(tmp_path / "cuda", "12.8")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("HYBRIDPRUNE_CUDA", raising=False)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    assert setup.names["wants_cuda"]() is False
    assert "of CUDA 12.8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "text", "reason"),
    [
        (
            "nvcc",
            "#!/bin/sh\necho release 13.0\n",
            "neither CUDA_HOME nor the PATH leads to the bin/nvcc of a CUDA toolkit",
        ),
        ("cuda/bin/nvcc", "#!/no/such/shell\n", "is of CUDA unknown and torch is built for CUDA 13.0"),
        ("cuda/bin/nvcc", "#!/bin/sh\nexit 1\n", "is of CUDA unknown and torch is built for CUDA 13.0"),
    ],
)
def test_an_nvcc_that_is_no_toolkit_of_cuda_is_one_line(
    setup, tmp_path, monkeypatch, capsys, place: str, text: str, reason: str
) -> None:
    nvcc = tmp_path / place
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(text)
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("HYBRIDPRUNE_CUDA", raising=False)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/usr/bin:/bin")
    assert setup.names["wants_cuda"]() is False
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("hybridprune-kernels: building for the CPU only: ")
    assert reason in said


def test_without_a_toolkit_or_cuda_in_torch_it_is_the_cpu(setup, monkeypatch, capsys) -> None:
    monkeypatch.delenv("HYBRIDPRUNE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    setup.names["torch"].version.cuda = None
    assert setup.names["wants_cuda"]() is False
    said = capsys.readouterr().err
    assert "nor the PATH leads to the bin/nvcc of a CUDA toolkit and torch 2.13.0 is built without CUDA" in said
