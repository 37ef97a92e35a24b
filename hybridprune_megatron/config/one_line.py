"""Ends a program with one line instead of a traceback, whatever ended it. Light: no torch."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

#: Set in the environment, it shows tracebacks after all.
TRACEBACK = "HYBRIDPRUNE_TRACEBACK"
#: Exit status of a program that a user or a file has given something wrong; every other failure is 1.
USER_ERROR = 2
INTERRUPTED = 130
#: Packages of the GPU's layers; compiled for one torch, they fail to import with another.
COMPILED = ("transformer_engine", "mamba_ssm", "causal_conv1d")
#: Characters of a line that are shown of its begin and its end.
_LONGEST = (1200, 400)
_ROOT = Path(__file__).resolve().parents[2]
_OWN = tuple(f"{_ROOT}/{folder}/" for folder in ("hybridprune_megatron", "recipes", "scripts", "studies"))
#: Their messages say all: errors of our own, and what the system refuses.
_SPEAKING = (ValueError, OSError, RuntimeError, ArithmeticError)

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(command: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates the main function of a program.

    What a user or a file can cause is a ``ValueError`` or an ``OSError``: one line, and status 2. Everything else ends
    in one line too, with status 1. ``HYBRIDPRUNE_TRACEBACK=1`` shows where an error came from.

    Args:
        command: the line starts with "hybridprune <command>: ".
    """
    prefix = f"hybridprune {command}"

    def decorate(main: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                _refuse_empty(args[0] if args and isinstance(args[0], list) else sys.argv[1:])
                return main(*args, **kwargs)
            except SystemExit:
                raise
            except KeyboardInterrupt:
                _end(f"{prefix}: stopped", INTERRUPTED)
            # What torch raises for a checkpoint is not an Exception.
            except BaseException as error:
                if os.environ.get(TRACEBACK):
                    raise
                if package := broken_package(error):
                    _end(f"{prefix}: {not_importable(package, error)}", USER_ERROR)
                _end(f"{prefix}: {one_line(error)}", USER_ERROR if isinstance(error, ValueError | OSError) else 1)

        return run

    return decorate


def whole(low: int, high: int) -> Callable[[str], int]:
    """For argparse: a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text:.40}: must be a whole number from {low} to {high}")
        return number

    return read


def _refuse_empty(arguments: Sequence[str]) -> None:
    """No program of this project has a use for an empty argument, and an empty path is the current folder."""
    for before, argument in pairwise(["", *arguments]):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            name = argument.strip() or before or "the first argument"
            raise ValueError(f"{name} is empty, as an unset shell variable is; give it a value")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of a readable length."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        # Of a worker process, which sends its traceback as the message.
        lines = lines[-1:]
    # Torch adds the frames of its own code.
    cut = next((i for i, line in enumerate(lines) if line.startswith(("Exception raised from", "frame #"))), len(lines))
    text = " ".join(" ".join(lines[: max(cut, 1)]).split())
    if len(text) > sum(_LONGEST):
        # The end of a line says what to do.
        text = f"{text[: _LONGEST[0]]} ... {text[-_LONGEST[1] :]}"
    if isinstance(error, _SPEAKING) and text:
        return text
    return f"{type(error).__name__}{': ' * bool(text)}{text}{_place(error)}"


def broken_package(error: BaseException) -> str | None:
    """The compiled package of a GPU while whose import an exception was raised; None: it comes from elsewhere."""
    for frame in traceback.extract_tb(error.__traceback__):
        folders = Path(frame.filename).parts
        found = [package for package in COMPILED if package in folders]
        if found and frame.name == "<module>":
            return found[0]
    return None


def not_importable(package: str, error: BaseException) -> str:
    """One line on a package that is there and cannot be imported, with the fix."""
    reason = " ".join(str(error).split())[: _LONGEST[1]]
    uninstall = package.replace("_", "-")
    return (
        f"{package} is installed and cannot be imported ({type(error).__name__}: {reason}): `make setup-gpu` compiles "
        f"it for the torch that is here, `pip uninstall {uninstall}` leaves plain torch (model.spec=torch)"
    )


def keep_traceback(folder: Path, rank: int) -> None:
    """Writes the traceback of the exception under way into a folder, for what its line does not tell.

    Args:
        folder: of the run's logs; nothing is written if it is not there.
    """
    try:
        if folder.is_dir():
            (folder / f"traceback_rank{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        # A full disk is what ended the run, maybe.
        return


def _place(error: BaseException) -> str:
    """The innermost line of this project that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_OWN) and frame.filename != __file__]
    where = f"{Path(own[-1].filename).relative_to(_ROOT)}:{own[-1].lineno}; " if own else ""
    return f" ({where}{TRACEBACK}=1 shows the way there)"


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)
