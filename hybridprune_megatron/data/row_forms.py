"""The forms that rows have elsewhere, read into one: messages with ``<video>`` placeholders, and paths of videos.

- LLaVA and ShareGPT: ``conversations`` of {"from": "human" | "gpt", "value": ...}, ``video`` or ``videos``.
- LLaVA-Video: the same, and ``<image>`` stands for the video.
- OpenAI and Qwen: ``messages`` whose content is a list of parts, some of which name their videos.
- LLaMA-Factory: ``messages`` or ``conversations``, ``videos``, and perhaps a ``system`` text.
- A ``question`` with perhaps an ``answer``.

What a row shows and nobody here reads, as sound, makes it a bad row: without it, its text says something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from hybridprune_megatron.config.json_text import short
from hybridprune_megatron.data.conversation import IMAGE_TOKEN, VIDEO_TOKEN

_VIDEO_KEYS = ("video", "videos")
_TURN_KEYS = ("conversations", "messages")
_ROW_KEYS = ("id", "question", "answer", "choices", "kind", "system", *_VIDEO_KEYS, *_TURN_KEYS)
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
    """The messages of a row and the paths of its videos.

    Args:
        row: plain values, of any form.

    Returns:
        Objects with role and content, which ``read_conversation`` checks; paths in the order of their placeholders.

    Raises:
        BadRowError: it has neither messages nor a question, names no path where one is expected, or shows media that
            are not read.
    """
    _refuse_media("", row, _VIDEO_KEYS, "a row shows videos alone, under video or videos")
    listed = _listed_videos(row)
    turns = _turns(row)
    if turns is None:
        return _asking(row, len(listed)), listed
    messages, named = _split_parts([_message(each) for each in turns])
    messages = _with_system(row.get("system"), messages)
    if listed and named and listed != named:
        raise BadRowError("video", f"videos {short(listed)}, and its messages name {short(named)}: give one of the two")
    videos = listed or named
    return (_as_videos(messages) if videos else messages), videos


def is_row_key(name: str) -> bool:
    """Whether a key means something in a row; others are about it, and not looked at."""
    return name in _ROW_KEYS or _MEDIA.fullmatch(name) is not None


def local_path(name: Any, what: str) -> str:
    """The path that a row gives for a video, as such or as ``file://``.

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


def _listed_videos(row: dict[str, Any]) -> list[str]:
    """Paths under ``video`` or ``videos``, each a path or a list of them; null, empty and absent mean none."""
    found = []
    for name in _VIDEO_KEYS:
        value = row.get(name)
        entries = [_stored_path(each, name) for each in (value if isinstance(value, list) else [value])]
        found.append([local_path(each, name) for each in entries if each not in (None, "")])
    if all(found) and found[0] != found[1]:
        raise BadRowError("video", f"video {short(found[0])} and videos {short(found[1])}: give one of the two")
    return found[0] or found[1]


def _stored_path(value: Any, name: str) -> Any:
    """The path of a video as ``datasets`` stores one: an object with path and bytes."""
    if not isinstance(value, dict) or set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is not None:
        raise BadRowError("video", f"{name} is the video itself: write it to a file, and give its path")
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


def _asking(row: dict[str, Any], num_videos: int) -> list[Any]:
    """The messages of a row with a question: it is asked about all videos, unless it says where they stand."""
    question = row["question"]
    if VIDEO_TOKEN not in question:
        question = f"{VIDEO_TOKEN}\n" * num_videos + question
    asked = {"role": "user", "content": question}
    answer = row.get("answer")
    messages = [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]
    return _with_system(row.get("system"), messages)


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


def _split_parts(messages: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Messages whose parts are text or the placeholder of a video, and the paths that parts named."""
    plain: list[Any] = []
    paths: list[str] = []
    for message in messages:
        if isinstance(message, dict):
            _refuse_media("message with ", message, (), "name videos in the row, or in the parts of a content")
            if isinstance(message.get("content"), list):
                message = {**message, "content": [_plain_part(part, paths) for part in message["content"]]}
        plain.append(message)
    return plain, paths


def _plain_part(part: Any, paths: list[str]) -> Any:
    """A part of a content; appends the path that it names to ``paths``."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or not _MEDIA.fullmatch(kind):
        if isinstance(part, dict):
            _refuse_media(f"part of type {short(kind)} with ", part, (), 'give it a part of its own, of type "video"')
        return part
    named = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
    if isinstance(named, dict):
        named = _stored_path(named.get("url", named), f"part {kind}")
    if kind not in ("video", "video_url"):
        if isinstance(named, str):
            local_path(named, kind)
        raise BadRowError("media", f"a part of type {short(kind)} is not read: a message shows videos alone")
    if any(part.get(key) is not None for key in _SPAN_KEYS):
        raise BadRowError("media", f"part {short(part)} shows a span of a video: cut the file, and give all of it")
    if named is not None:
        paths.append(local_path(named, kind))
    return {"type": "video"}


def _as_videos(messages: list[Any]) -> list[Any]:
    """Messages in which every ``<image>`` of a user stands for a video, if none of them shows one by ``<video>``."""
    if any(_is_user(each) and _shows_video(each.get("content")) for each in messages):
        return messages
    return [{**each, "content": _replaced(each.get("content"))} if _is_user(each) else each for each in messages]


def _is_user(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def _shows_video(content: Any) -> bool:
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return any(part.get("type") == "video" or _shows_video(part.get("text")) for part in parts)
    return isinstance(content, str) and VIDEO_TOKEN in content


def _replaced(content: Any) -> Any:
    if isinstance(content, list):
        texts = [_replaced(part["text"]) if isinstance(part, dict) and "text" in part else None for part in content]
        return [part if text is None else {**part, "text": text} for part, text in zip(content, texts)]
    return content.replace(IMAGE_TOKEN, VIDEO_TOKEN) if isinstance(content, str) else content
