"""Whatever ends a program ends it with one line, in every recipe and script."""

from __future__ import annotations

import errno
import importlib
import sys
from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.commands import ask
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.one_line import TRACEBACK, keep_traceback, one_line_errors, whole
from studies.scaling.assumptions import Assumptions, changed
from tests.own_time import run_timed

ROOT = CONF_DIR.parent
#: One asks an export and does without the package, one calls the others, one starts where nothing may be importable.
OWN_WAY = {"__init__.py", "ask.py", "door.py", "gpu_day_one.py"}
BASE = ["checkpoint=assets/demo/base.safetensors", "experiment=demo"]


class _OfTorch(BaseException):
    """As torch's CheckpointException, no Exception."""


def _ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    @one_line_errors("program")
    def main(arguments: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        main([])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert isinstance(end.value.code, int)
    return end.value.code, printed.err.rstrip("\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a=1: must be 2"), 2, "hybridprune program: a=1: must be 2"),
        (ValueError("two\n  lines"), 2, "hybridprune program: two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "hybridprune program: No space left on device"),
        (FileNotFoundError(2, "No such file", "/x"), 2, "hybridprune program: No such file (/x)"),
        (RuntimeError("Caught KeyError in worker 0.\nTraceback (most recent call last):\n  File\nKeyError: 'x'\n"), 1,
         "hybridprune program: KeyError: 'x'"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] . can't allocate\nException raised from f\nframe #0: g"), 1,
         "hybridprune program: [enforce fail at alloc_cpu.cpp] . can't allocate"),
        (KeyError("weight"), 1, f"hybridprune program: KeyError: 'weight' ({TRACEBACK}=1 shows the way there)"),
        (AssertionError(), 1, f"hybridprune program: AssertionError ({TRACEBACK}=1 shows the way there)"),
        (_OfTorch("rank 0"), 1, f"hybridprune program: _OfTorch: rank 0 ({TRACEBACK}=1 shows the way there)"),
        (KeyboardInterrupt(), 130, "hybridprune program: stopped"),
        (ValueError(f"{'x' * 10_000}; set y"), 2, f"hybridprune program: {'x' * 1200} ... {'x' * 393}; set y"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_an_error_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert _ended_by(error, capsys) == (status, line)


def test_a_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @one_line_errors("program")
    def main(arguments: list[str]) -> None:
        raise KeyError("x")

    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyError):
        main([])
    try:
        raise KeyError("x")
    except KeyError:
        keep_traceback(tmp_path, 3)
        keep_traceback(tmp_path / "gone", 3)
    assert "KeyError: 'x'" in (tmp_path / "traceback_rank3.txt").read_text()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--out", ""], "--out"),
        (["--out="], "--out="),
        (["", "x"], "the first argument"),
        (["--out", "  "], "--out"),
    ],
)
def test_an_empty_argument_is_no_path(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors("program")
    def main(arguments: list[str]) -> None:
        raise AssertionError(arguments)

    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said == f"hybridprune program: {name} is empty, as an unset shell variable is; give it a value\n"


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e3", "9" * 30, "11", "", "x"])
def test_counts_of_the_command_line_have_bounds(text: str) -> None:
    read = whole(1, 10)
    assert (read("1"), read("10")) == (1, 10)
    with pytest.raises(Exception, match=r"must be a whole number from 1 to 10$"):
        read(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_an_assumption_is_a_finite_number(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^linear=.*: must be a finite number; set e.g. linear="):
        changed(Assumptions(), [f"linear={text}"])


@pytest.mark.parametrize("folder", ["recipes", "scripts", "studies/base", "hybridprune_megatron/commands"])
def test_every_program_ends_in_one_line(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        source = path.read_text()
        # What only calls a command ends as that does.
        if path.name not in OWN_WAY and "import hybridprune_megatron.commands" not in source.replace("from", "import"):
            assert source.count("\n@one_line_errors(") == 1, path
            assert source[source.index("\n@one_line_errors(") :].split("\n")[2].startswith("def main("), path


def test_wrong_data_is_said_before_the_slow_imports(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), "experiment=demo", f"data.train={tmp_path}"]
    done, seconds = run_timed([*command, "data.validation=null"], ROOT, limit_s=3)
    assert done.returncode == 2
    assert done.stderr.startswith(f"hybridprune finetune: data.train={tmp_path}: is not an Energon data set")
    assert done.stderr.count("\n") == 1
    assert seconds < 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("plan", ["target.speedup=nan"], "hybridprune plan: target.speedup=nan: must be a finite number above 1"),
        ("benchmark", ["reduction.budget=inf"], "hybridprune benchmark: reduction.budget=inf: must be above 0 and at "),
        ("study", ["optim.lr=nan"], "hybridprune study: optim.lr=nan: must be a finite number above 0"),
        ("demo", ["output_dir="], "hybridprune demo: output_dir='': is empty"),
        ("analyze", ["checkpoint=conf"], "hybridprune analyze: --checkpoint=conf: no complete checkpoint there"),
        (
            "analyze",
            [*BASE, "samples=1e9"],
            "hybridprune analyze: samples=1e9: must be",
        ),
        (
            "analyze",
            [*BASE, "data=conf"],
            "hybridprune analyze: data=conf: is not an E",
        ),
        (
            "analyze",
            [*BASE, "name=../x"],
            "hybridprune analyze: name=../x: must be a f",
        ),
    ],
)
def test_recipes_refuse_in_one_line(
    program: str, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"recipes.{program}").main(arguments)
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--question", " ", "--question is empty"),
        ("--video", "gone.mp4", "--video gone.mp4: is not a file"),
        ("--video", ".", "--video .: is not a file"),
        ("--model", ".", "--model .: is not a folder with a config.json"),
        ("--budget", "nan", "--budget nan: must be above 0 and at most 1"),
        ("--max-new-tokens", "0", "--max-new-tokens 0: from 1 to"),
        ("--max-new-tokens", "9" * 30, f"--max-new-tokens {'9' * 30}: from 1 to"),
    ],
)
def test_a_question_that_cannot_be_asked(
    option: str, value: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ask.main(_question(tmp_path, option, value))
    assert f"error: {line}" in capsys.readouterr().err.splitlines()[-1]


def test_what_the_export_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(options: object) -> str:
        raise OSError("the video\ncannot be read")

    monkeypatch.setattr(ask, "answer", refuse)
    with pytest.raises(SystemExit, match="2"):
        ask.main(_question(tmp_path, "--budget", "0.5"))
    assert capsys.readouterr().err == "hybridprune ask: the video cannot be read\n"


def _question(folder: Path, option: str, value: str) -> list[str]:
    (folder / "config.json").touch()
    given = {"--model": str(folder), "--video": str(folder / "config.json"), "--question": "What?", option: value}
    return [word for pair in given.items() for word in pair]


def test_the_demo_waits_for_a_program_that_ctrl_c_reaches_too() -> None:
    class Program:
        interrupted = False

        def communicate(self) -> tuple[str, None]:
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return "saved", None

    assert importlib.import_module("recipes.demo")._output_of(Program()) == "saved"
