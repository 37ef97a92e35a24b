"""The forms that rows have elsewhere, read into one: messages with placeholders, and paths of videos and images.

- LLaVA and ShareGPT: ``conversations`` of {"from": "human" | "gpt", "value": ...}, ``video`` or ``videos``,
  ``image`` or ``images``.
- LLaVA-Video: the same, and ``<image>`` stands for the video.
- OpenAI and Qwen: ``messages`` whose content is a list of parts, some of which name their videos and images.
- LLaMA-Factory: ``messages`` or ``conversations``, ``videos``, ``images``, and perhaps a ``system`` text.
- A ``question`` with perhaps an ``answer``.

What a row shows and nobody here reads, as sound, makes it a bad row: without it, its text says something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from hybridprune_megatron.config.json_text import short
from hybridprune_megatron.data.conversation import IMAGE_TOKEN, MEDIA_PATTERN, MEDIA_TOKENS, VIDEO_TOKEN

_LISTED_KEYS = {"video": ("video", "videos"), "image": ("image", "images")}
_READ_KEYS = ("video", "videos", "image", "images")
_PART_KINDS = {"video": "video", "video_url": "video", "image": "image", "image_url": "image"}
_TURN_KEYS = ("conversations", "messages")
_ROW_KEYS = ("id", "question", "answer", "choices", "kind", "system", *_READ_KEYS, *_TURN_KEYS)
#: Of a part that shows less than its whole video.
_SPAN_KEYS = ("video_start", "video_end")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MEDIUM = "image|img|picture|photo|audio|sound|speech|voice|video|clip|movie|frame|gif|wav|mp3|mp4"
#: Keys of a row, and types of a content's part, that are about a picture, a sound or a video.
_MEDIA = re.compile(
    rf"(?:input_?)?(?:{_MEDIUM})s?(?:_?(?:url|uri|path|file|filename|byte|list|array|data)s?)?", re.IGNORECASE
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):", re.IGNORECASE)


class BadRowError(ValueError):
    """A row that is left out.

    Attributes:
        reason: what a report counts it under: json, table, conversation, media, video or answer.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_form(row: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The messages of a row and the paths of its videos and images.

    Args:
        row: plain values, of any form.

    Returns:
        Objects with role and content, which ``read_conversation`` checks; paths in the order of their placeholders.

    Raises:
        BadRowError: it has neither messages nor a question, names no path where one is expected, or shows media that
            are not read.
    """
    _refuse_media("", row, _READ_KEYS, "a row shows videos under video or videos, images under image or images")
    listed = {kind: _listed(row, keys) for kind, keys in _LISTED_KEYS.items()}
    turns = _turns(row)
    given = _asking(row, listed) if turns is None else turns
    messages, named = _split_parts([_message(each) for each in given])
    messages = _with_system(row.get("system"), messages)
    paths = {kind: _one_of(kind, listed[kind], named[kind]) for kind in listed}
    if paths["video"] and not paths["image"]:
        messages = _as_videos(messages)
    return messages, _in_order(messages, paths)


def is_row_key(name: str) -> bool:
    """Whether a key means something in a row; others are about it, and not looked at."""
    return name in _ROW_KEYS or _MEDIA.fullmatch(name) is not None


def local_path(name: Any, what: str) -> str:
    """The path that a row gives for a video or an image, as such or as ``file://``.

    Args:
        what: names it in an error.

    Raises:
        BadRowError: it is no text, or the address of something that would have to be fetched.
    """
    if not isinstance(name, str):
        raise BadRowError("video", f"{what} {short(name)}: expected paths")
    match = _URL.match(name)
    if match is None:
        return name
    if (match[1] or match[2]).lower() != "file":
        raise BadRowError(
            "video", f"{what} {short(name)} is not fetched: put the file below the folder of videos, and give its path"
        )
    try:
        url = urlsplit(name)
    except ValueError:
        url = None
    if url is None or url.netloc not in ("", "localhost"):
        raise BadRowError("video", f"{what} {short(name)} is a file of another machine: expected file:///path")
    return unquote(url.path)


def _refuse_media(where: str, values: dict[str, Any], read: Sequence[str], fix: str) -> None:
    """Raises if anything but the keys ``read`` is about a picture, a sound or a video and not empty."""
    for name, value in values.items():
        if name not in read and _MEDIA.fullmatch(name) and not _is_nothing(value):
            raise BadRowError("media", f"{where}{short(name)}: {short(value)} is not read: {fix}")


def _is_nothing(value: Any) -> bool:
    """Whether a value names nothing that could be shown; a number says how many or how long."""
    if isinstance(value, dict | list):
        return all(each is None for each in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float) or value in ("", b"")


def _listed(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Paths under one of two keys, each a path or a list of them; null, empty and absent mean none."""
    found = []
    for name in keys:
        value = row.get(name)
        entries = [_stored_path(each, name) for each in (value if isinstance(value, list) else [value])]
        found.append([local_path(each, name) for each in entries if each not in (None, "")])
    if all(found) and found[0] != found[1]:
        both = " and ".join(f"{name} {short(paths)}" for name, paths in zip(keys, found))
        raise BadRowError("video", f"{both}: give one of the two")
    return found[0] or found[1]


def _stored_path(value: Any, name: str) -> Any:
    """The path of a video or an image as ``datasets`` stores one: an object with path and bytes."""
    if not isinstance(value, dict) or set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is not None:
        raise BadRowError("video", f"{name} is the file itself: write it to the folder of videos, and give its path")
    return value["path"]


def _turns(row: dict[str, Any]) -> list[Any] | None:
    """What is under ``conversations`` or ``messages``; None for a row with a question alone."""
    given = {name: _as_list(row[name]) for name in _TURN_KEYS if row.get(name) is not None}
    if len(given) == 2:
        given = {name: turns for name, turns in given.items() if turns != []}
    if len(given) == 2 and given["messages"] != given["conversations"]:
        raise BadRowError("conversation", "conversations and messages differ: give one of the two")
    turns = next(iter(given.values()), None)
    if turns is None and isinstance(row.get("question"), str):
        return None
    if not isinstance(turns, list):
        raise BadRowError(
            "conversation", 'expected an object with a list under "conversations" or "messages", or with a "question"'
        )
    return turns


def _as_list(value: Any) -> Any:
    """Messages that a table stores by column, {"from": [...], "value": [...]}, as a list of objects."""
    if not isinstance(value, dict) or not value or not all(isinstance(each, list) for each in value.values()):
        return value
    if len({len(each) for each in value.values()}) > 1:
        return value
    return [dict(zip(value, entries)) for entries in zip(*value.values())]


def _asking(row: dict[str, Any], listed: dict[str, list[str]]) -> list[Any]:
    """The messages of a row with a question: it is asked about all that it shows, unless it says where that stands."""
    question = row["question"]
    if not MEDIA_PATTERN.search(question):
        question = "".join(f"{MEDIA_TOKENS[kind]}\n" * len(paths) for kind, paths in listed.items()) + question
    asked = {"role": "user", "content": question}
    answer = row.get("answer")
    return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]


def _message(message: Any) -> Any:
    """A message with role and content, of one with from and value."""
    if not isinstance(message, dict) or message.get("from") is None or "value" not in message:
        return message
    name = message["from"]
    return {"role": _ROLES.get(name, name) if isinstance(name, str) else name, "content": message["value"]}


def _with_system(text: Any, messages: list[Any]) -> list[Any]:
    """Messages after the system's, where a row says that beside them."""
    if text in (None, ""):
        return messages
    return [{"role": "system", "content": text}, *messages]


def _one_of(kind: str, listed: list[str], named: list[str]) -> list[str]:
    """The paths that a row lists, or that the parts of its messages name."""
    if listed and named and listed != named:
        raise BadRowError(
            "video", f"{kind}s {short(listed)}, and its messages name {short(named)}: give one of the two"
        )
    return listed or named


def _in_order(messages: Sequence[Any], paths: dict[str, list[str]]) -> list[str]:
    """Paths in the order of their placeholders in what users say; what has none comes last, for a check to refuse."""
    kinds = {token: kind for kind, token in MEDIA_TOKENS.items()}
    left = {kind: list(reversed(each)) for kind, each in paths.items()}
    shown = [token for each in messages if _is_user(each) for token in MEDIA_PATTERN.findall(_shown(each["content"]))]
    found = [left[kinds[token]].pop() for token in shown if left[kinds[token]]]
    return found + [path for each in left.values() for path in reversed(each)]


def _split_parts(messages: Sequence[Any]) -> tuple[list[Any], dict[str, list[str]]]:
    """Messages whose parts are texts or placeholders, and the paths of each kind that parts named."""
    plain: list[Any] = []
    paths: dict[str, list[str]] = {kind: [] for kind in _LISTED_KEYS}
    for message in messages:
        if isinstance(message, dict):
            _refuse_media("message with ", message, (), "name files in the row, or in the parts of a content")
            if isinstance(message.get("content"), list):
                message = {**message, "content": [_plain_part(part, paths) for part in message["content"]]}
        plain.append(message)
    return plain, paths


def _plain_part(part: Any, paths: dict[str, list[str]]) -> Any:
    """A part of a content; appends the path that it names to ``paths`` of its kind."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or not _MEDIA.fullmatch(kind):
        if isinstance(part, dict):
            _refuse_media(f"part of type {short(kind)} with ", part, (), "give it a part of its own, of its type")
        return part
    named = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
    if isinstance(named, dict):
        named = _stored_path(named.get("url", named), f"part {kind}")
    if kind not in _PART_KINDS:
        raise BadRowError("media", f"a part of type {short(kind)} is not read: a message shows videos and images")
    if any(part.get(key) is not None for key in _SPAN_KEYS):
        raise BadRowError("media", f"part {short(part)} shows a span of a video: cut the file, and give all of it")
    if named is not None:
        paths[_PART_KINDS[kind]].append(local_path(named, kind))
    return {"type": _PART_KINDS[kind]}


def _as_videos(messages: list[Any]) -> list[Any]:
    """Messages in which every ``<image>`` of a user stands for a video, if none of them shows one by ``<video>``."""
    if any(_is_user(each) and VIDEO_TOKEN in _shown(each.get("content")) for each in messages):
        return messages
    return [{**each, "content": _replaced(each.get("content"))} if _is_user(each) else each for each in messages]


def _is_user(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user" and "content" in message


def _shown(content: Any) -> str:
    """A content as text, as far as it is one."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(MEDIA_TOKENS.get(str(part.get("type"))) or _shown(part.get("text")) for part in parts)
    return content if isinstance(content, str) else ""


def _replaced(content: Any) -> Any:
    if isinstance(content, list):
        return [_replaced_part(part) if isinstance(part, dict) else part for part in content]
    return content.replace(IMAGE_TOKEN, VIDEO_TOKEN) if isinstance(content, str) else content


def _replaced_part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "image":
        return {"type": "video"}
    return {**part, "text": _replaced(part["text"])} if "text" in part else part
