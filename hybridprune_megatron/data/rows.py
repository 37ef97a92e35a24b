"""Conversations as users have them, one per row of a JSONL file, of a JSON array or of a table.

``raw_rows`` finds the rows of a file, ``read_row`` says what a row means, ``check_row`` asks the code that training
uses. A row has an id, messages and the paths of its videos, in any of the forms of ``row_forms``. It may say which
``answer`` is right, of which ``choices``, and the ``kind`` of the question. It comes from somewhere else: whatever is
wrong with it is a ``BadRowError``.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.json_text import parse_json, short
from hybridprune_megatron.data.conversation import (
    RESERVED_TOKENS,
    Conversation,
    check_media,
    media_types,
    read_conversation,
)
from hybridprune_megatron.data.known import Known
from hybridprune_megatron.data.prompt import CONVERSATION_MODES, PromptEncoder
from hybridprune_megatron.data.row_forms import BadRowError, read_form
from hybridprune_megatron.data.stored_media import kinds_of_names

#: Bytes of a row. A longer one is not parsed.
MOST_ROW_BYTES = 2**24
_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
#: What decides where the elements of a JSON array end. A string is skipped whole, an open one up to the end.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)|[\[\]{},]', flags=re.DOTALL)
_MOST_KEY = 80
#: What is said about the right answer.
_KNOWN = ("answer", "choices", "kind")


@dataclass(frozen=True)
class Row:
    """A conversation and what it is about.

    Attributes:
        id: text or a number as the file has it, of another type as text; None where it has none.
        messages: objects with role and content.
        videos: paths of videos and images as the file has them, in the order of their placeholders.
        known: what it says about the right answer, as the file has it.
    """

    id: str | int | float | None
    messages: list[Any]
    videos: list[str]
    known: dict[str, Any] = field(default_factory=dict)


def open_rows(path: Path) -> mmap.mmap | bytes:
    """The content of a file, which need not fit into memory.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if path.is_file() and path.stat().st_size:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return file.read()


def raw_rows(data: mmap.mmap | bytes) -> Iterator[tuple[int, int, bytes]]:
    """The rows of a file.

    Args:
        data: its content, JSONL or a JSON array.

    Yields:
        Number of the row (of its line, or of the array's element, from 1), the offset at which it ends, its JSON.
    """
    start = len(_MARK) if data[: len(_MARK)] == _MARK else 0
    return _elements(data, start) if _is_array(data, start) else _lines(data, start)


def read_row(text: bytes) -> Row:
    """What a row means.

    Raises:
        BadRowError: it cannot be told.
    """
    if len(text) > MOST_ROW_BYTES:
        raise BadRowError("json", f"{len(text)} bytes, above {MOST_ROW_BYTES}")
    try:
        row = parse_json(text)
    except ValueError as error:
        raise BadRowError("json", f"not JSON ({error})") from error
    return plain_row(row)


def plain_row(row: Any) -> Row:
    """What plain values mean, those of a row's JSON or of a row of a table.

    Raises:
        BadRowError: it cannot be told.
    """
    if not isinstance(row, dict):
        raise BadRowError("conversation", f"{short(row)}: expected an object with conversations or messages")
    row_id = row.get("id")
    if not isinstance(row_id, str | int | float | None) or (isinstance(row_id, float) and not math.isfinite(row_id)):
        row_id = short(row_id)
    messages, videos = read_form(row)
    known = {name: row[name] for name in _KNOWN if name in row}
    return Row(None if row_id == "" else row_id, messages, videos, known)


def known_of(row: Row, said: str | None) -> Known:
    """What a row says about the right answer.

    Args:
        said: the answer of its conversation, which is right where the row has choices and does not say which is.

    Raises:
        BadRowError: it is malformed.
    """
    try:
        known = Known.of(row.known, said)
        return replace(known, answer=said) if known.choices and known.answer is None else known
    except ValueError as error:
        raise BadRowError("answer", str(error)) from error


def row_conversation(row: Row) -> Conversation:
    """The conversation of a row, which shows the videos and images that the row names.

    Raises:
        BadRowError: it is malformed, or shows others.
    """
    kinds = kinds_of_names(row.videos)
    try:
        conversation = read_conversation(row.messages, media_types(kinds))
    except ValueError as error:
        raise BadRowError("conversation", str(error)) from error
    try:
        check_media(conversation, kinds)
    except ValueError as error:
        raise BadRowError("video", str(error)) from error
    return conversation


def check_row(row: Row) -> Conversation:
    """The conversation of a row that training does not leave out, however it is configured.

    Raises:
        BadRowError: training leaves it out always.
    """
    conversation, kinds = row_conversation(row), kinds_of_names(row.videos)
    errors = []
    for mode in CONVERSATION_MODES:
        try:
            _encoder().encode_samples(conversation, [1 if kind == "image" else [0.0] for kind in kinds], mode)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(CONVERSATION_MODES):
        raise BadRowError("conversation", str(errors[0]))
    return conversation


def unique_key(row_id: str | int | float | None, number: int, taken: Collection[str]) -> str:
    """A key for a row's sample: its id as far as keys allow, and its number where that says nothing or is taken."""
    # A key holds no dot and no slash: both mean something in the name of a tar member.
    stem = "" if row_id is None else re.sub(r"[^A-Za-z0-9_-]", "_", str(row_id))[:_MOST_KEY]
    key = stem if re.search(r"[A-Za-z0-9]", stem) else f"row-{number:08d}"
    while key in taken:
        key = f"{key}-{number:08d}"
    return key


def _is_array(data: mmap.mmap | bytes, start: int) -> bool:
    """Whether a file is one JSON array, and not lines of which the first happens to be one."""
    match = re.compile(rb"[ \t\r\n]*+\[").match(data, start)
    if match is None:
        return False
    end = data.find(b"\n", match.end())
    if end < 0 or end - start > MOST_ROW_BYTES or not re.compile(rb"[ \t\r\n]*+[^ \t\r\n]").match(data, end):
        return True
    try:
        parse_json(data[match.end() - 1 : end])
    except ValueError:
        return True
    return False


def _lines(data: mmap.mmap | bytes, start: int) -> Iterator[tuple[int, int, bytes]]:
    number = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        text = data[start:end].strip(_BLANK)
        if text:
            yield number, end, text
        start = end + 1


def _elements(data: mmap.mmap | bytes, start: int) -> Iterator[tuple[int, int, bytes]]:
    """The elements of an array, found by their brackets: one that is not JSON costs no other."""
    number, depth = 0, 0
    for match in _STRUCTURE.finditer(data, start):
        sign = match[0]
        if sign in (b"[", b"{"):
            depth += 1
            if depth == 1:
                start = match.end()
        elif sign in (b"]", b"}"):
            depth -= 1
        if (depth == 1 and sign == b",") or depth == 0:
            text = data[start : match.start()].strip(_BLANK)
            if text or sign == b",":
                number += 1
                yield number, match.start(), text
            start = match.end()
        if depth == 0:
            break
    rest = data[start:].strip(_BLANK)
    if rest:
        yield number + 1, len(data), rest


@cache
def _encoder() -> PromptEncoder:
    return PromptEncoder(_Characters(), tokens_per_frame=1)


class _Characters:
    """Stands for the tokenizer, which is not known yet: every character is a token."""

    unk_token_id = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if text in RESERVED_TOKENS:
            return [-1 - RESERVED_TOKENS.index(text)]
        return [ord(character) for character in text]
