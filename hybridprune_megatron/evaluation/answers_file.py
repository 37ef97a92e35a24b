"""A JSONL file of answers that grows by whole lines, and is continued by the command that began it.

Every line says which model answered and how, so that answers of two models never get into one file. Nothing slow is
imported.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hybridprune_megatron.checks import shown
from hybridprune_megatron.config.json_text import parse_json

_REMEDY = "give another file, or remove it"


@dataclass(frozen=True)
class Answer:
    """A line of the file.

    Attributes:
        key: of the row.
        videos: paths as the row has them.
        question: without the placeholders of videos.
        answer: the right one, where the row says so.
        prediction: what the model wrote.
        model: checkpoint or export.
        overrides: what was changed in its configuration.
        budget: mean share of visual tokens over its layers.
        max_new_tokens: longest prediction.
    """

    key: str
    videos: list[str]
    question: str
    answer: str | None
    prediction: str
    model: str
    overrides: str
    budget: float
    max_new_tokens: int

    @property
    def asked(self) -> tuple[Any, ...]:
        """What tells this question from others of the same file."""
        return (self.key, tuple(self.videos), self.question)

    @property
    def how(self) -> dict[str, Any]:
        """What all lines of a file have in common."""
        return {name: getattr(self, name) for name in _HOW}


_HOW = ("model", "overrides", "budget", "max_new_tokens")
_NAMES = [field.name for field in fields(Answer)]
#: How a line begins, for one that was cut.
_BEGIN = b'{"key": "'


def read_answers(path: Path, how: dict[str, Any]) -> tuple[set[tuple[Any, ...]], int]:
    """What an earlier call has answered already.

    Args:
        path: need not be there.
        how: model, overrides, budget and max_new_tokens of this call.

    Returns:
        ``Answer.asked`` of all whole lines, and the bytes that these fill; what follows is a line that was cut.

    Raises:
        ValueError: it is another file, or holds answers of another model, or that it gave in another way.
    """
    asked: set[tuple[Any, ...]] = set()
    if not os.path.lexists(path):
        return asked, 0
    if not path.is_file():
        raise ValueError(f"out={path} is not a file: give a file")
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if line[: len(_BEGIN)] != _BEGIN[: len(line)]:
                    raise _foreign(path, number)
                break
            answer = _parsed(path, number, line)
            if answer.how != how:
                wrong = ", ".join(f"{name}={shown(answer.how[name])}" for name in _HOW if answer.how[name] != how[name])
                raise ValueError(f"out={path} holds answers with {wrong}: {_REMEDY}, or ask with the same")
            asked.add(answer.asked)
            size += len(line)
    return asked, size


class AnswersFile:
    """The file, open for more answers; use as a context manager. What ``add`` was given survives the process.

    Args:
        path: new, or one that an earlier call began.
        how: as for ``read_answers``.

    Attributes:
        asked: what has been answered so far.
    """

    def __init__(self, path: Path, how: dict[str, Any]) -> None:
        self._path, self._how = path, how
        self.asked: set[tuple[Any, ...]] = set()
        self._file: BinaryIO | None = None

    def __enter__(self) -> AnswersFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not emptied: what is there is looked at first, under the lock.
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.asked, size = read_answers(self._path, self._how)
            self._file.truncate(size)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"out={self._path} is being written by another process: wait, or give another") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def add(self, answers: Iterable[Answer]) -> None:
        """Writes answers, through to the disk."""
        assert self._file is not None, "the file is not open"
        for answer in answers:
            self._file.write(json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n")
            self.asked.add(answer.asked)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None, "the file is not open"
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()


def _parsed(path: Path, number: int, line: bytes) -> Answer:
    try:
        content = parse_json(line)
    except ValueError:
        content = None
    if not isinstance(content, dict) or list(content) != _NAMES or not isinstance(content["videos"], list):
        raise _foreign(path, number)
    return Answer(**content)


def _foreign(path: Path, number: int) -> ValueError:
    return ValueError(f"out={path}: line {number} was not written by hybridprune predict: {_REMEDY}")
