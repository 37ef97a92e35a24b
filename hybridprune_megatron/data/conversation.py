"""Conversations, and the text that they are rendered as and read from.

Format (system turn left out if there is none):

    <SPECIAL_10>System\\n{system}\\n<SPECIAL_11>User\\n{content}\\n<SPECIAL_11>Assistant\\n{answer}\\n<SPECIAL_12>

with a newline between ``<SPECIAL_12>`` and the next turn. ``<video>`` in the user's content becomes the frames of that
video, joined by newlines, then one newline (a newline that directly follows the placeholder is taken for that one):

    Frame 1 sampled at 0.00 seconds: <img><image>...<image></img>

``<image>`` becomes one frame without that text, where a sample has images; elsewhere it is reserved.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from hybridprune_megatron.config.json_text import short

# Those that are not used here are the conversation's all the same: who writes prompts takes them from here.
from hybridprune_megatron.config.prompt_tokens import (  # noqa: F401
    END_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    RESERVED_TOKENS,
    SYSTEM_TOKEN,
    TURN_TOKEN,
    VIDEO_TOKEN,
)

#: Placeholders in a prompt, by the type of a part.
MEDIA_TOKENS = {"video": VIDEO_TOKEN, "image": IMAGE_TOKEN}
MEDIA_PATTERN = re.compile("|".join(MEDIA_TOKENS.values()))
#: Messages of a conversation. With ``split_turns`` every turn is a sample that begins with all earlier ones.
MOST_MESSAGES = 1000

_ROLE_MARKERS = {
    "system": f"{SYSTEM_TOKEN}System\n",
    "user": f"{TURN_TOKEN}User\n",
    "assistant": f"{TURN_TOKEN}Assistant\n",
}
_ORDER = "expected user and assistant in turn, after at most one system message"
_TURN_PATTERN = re.compile("|".join(f"(?P<{role}>{re.escape(marker)})" for role, marker in _ROLE_MARKERS.items()))


@dataclass(frozen=True)
class Conversation:
    """A conversation whose turns alternate.

    Attributes:
        system: text of the system turn, or None.
        questions: user contents, at least one; ``<video>`` stands for a video, ``<image>`` for an image.
        answers: assistant texts; one fewer than questions in a prompt that waits for its answer.
    """

    system: str | None
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """What its placeholders stand for, in order: ``video`` or ``image``."""
        kind = {token: name for name, token in MEDIA_TOKENS.items()}
        return [kind[token] for question in self.questions for token in MEDIA_PATTERN.findall(question)]

    @property
    def num_videos(self) -> int:
        """Videos and images."""
        return len(self.kinds)

    def messages(self) -> list[dict[str, str]]:
        """What ``read_conversation`` makes this of, in its shortest form."""
        turns = [text for turn in zip_longest(self.questions, self.answers) for text in turn if text is not None]
        messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]

    def up_to(self, num_turns: int) -> Conversation:
        """The first turns only."""
        return Conversation(self.system, self.questions[:num_turns], self.answers[:num_turns])


def read_conversation(messages: Sequence[dict[str, Any]], types: Sequence[str] = ("video",)) -> Conversation:
    """Checks a list of ``{"role", "content"}``; content is a string or a list of ``{"type": "video"|"text"}`` parts.

    Args:
        types: which of ``MEDIA_TOKENS`` a user's content may hold.

    Raises:
        ValueError: roles do not alternate, there is no question, or a content holds a reserved token.
    """
    if not isinstance(messages, list | tuple) or not 0 < len(messages) <= MOST_MESSAGES:
        shown = f"{len(messages)} messages" if isinstance(messages, list | tuple) else short(messages)
        raise ValueError(
            f"conversation is {shown}: expected a list of messages with role and content, at most {MOST_MESSAGES}"
        )
    contents: list[tuple[str, str]] = []
    media = {name: MEDIA_TOKENS[name] for name in types}
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {short(message)}: expected an object with role and content")
        role, text = message["role"], _content_text(message["content"], media)
        if role not in list(_ROLE_MARKERS):
            raise ValueError(f"role {short(role)}: {_ORDER}")
        # The system turn too, or its text could forge the turns after it.
        _check_text(role, text, media.values() if role == "user" else ())
        contents.append((role, text))
    system = contents.pop(0)[1] if contents[0][0] == "system" else None
    expected = ["user", "assistant"] * (len(contents) // 2 + 1)
    roles = [role for role, _ in contents]
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(f"roles {short(roles)}: {_ORDER}")
    texts = [text for _, text in contents]
    return Conversation(system, tuple(texts[0::2]), tuple(texts[1::2]))


def _check_text(role: str, text: str, allowed: Collection[str]) -> None:
    """Refuses a text that would be read as more than the content of its turn.

    A tokenizer may make reserved tokens of other text, too: ``PromptEncoder`` looks at the tokens.
    """
    held = [token for token in (*RESERVED_TOKENS, VIDEO_TOKEN) if token in text and token not in allowed]
    if held:
        raise ValueError(f"{role} content holds {held[0]}: reserved for the prompt format; remove it from the text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{role} content holds {text[error.start]!a}, half of a character: remove it") from None


def check_videos(conversation: Conversation, count: int) -> None:
    """Every placeholder has its video or image.

    Raises:
        ValueError: there are ``count`` of them and another number of placeholders.
    """
    kinds = conversation.kinds
    if len(kinds) == count:
        return
    if "image" in kinds:
        raise ValueError(f"{len(kinds)} placeholders of videos and images but {count} of these")
    raise ValueError(f"{len(kinds)} {VIDEO_TOKEN} placeholders but {count} videos")


def media_types(kinds: Collection[str]) -> tuple[str, ...]:
    """The ``types`` of ``read_conversation`` for a sample with media of these kinds: without images, none is shown."""
    return tuple(MEDIA_TOKENS) if "image" in kinds else ("video",)


def check_media(conversation: Conversation, kinds: Sequence[str]) -> None:
    """Every placeholder has its video or image, and a ``<video>`` a video.

    Args:
        kinds: ``video`` or ``image``, for each file of the sample.

    Raises:
        ValueError: other numbers, or another kind in its place.
    """
    check_videos(conversation, len(kinds))
    for number, (shown, kind) in enumerate(zip(conversation.kinds, kinds), 1):
        if shown != kind:
            article = "an" if kind == "image" else "a"
            raise ValueError(
                f"placeholder {number} is {MEDIA_TOKENS[shown]}, and the type of its file {article} {kind}'s"
            )


def render_chat(conversation: Conversation) -> str:
    """The conversation as one string, videos not expanded: what the chat template of the export renders."""
    text = "" if conversation.system is None else f"{_ROLE_MARKERS['system']}{conversation.system}\n"
    for turn, question in enumerate(conversation.questions):
        text += "\n" if turn else ""
        text += f"{_ROLE_MARKERS['user']}{question}\n{_ROLE_MARKERS['assistant']}"
        if turn < len(conversation.answers):
            text += f"{conversation.answers[turn]}\n{END_TOKEN}"
    return text


def parse_chat(text: str) -> Conversation:
    """The reverse of ``render_chat``; a last user turn without the assistant's marker gets it.

    Raises:
        ValueError: the text is not in the format of the chat template.
    """
    marks = list(_TURN_PATTERN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError(
            f"prompt starts with {text[:40]!r}: expected {TURN_TOKEN}User; render it with the chat template"
        )
    messages = []
    for mark, following in zip(marks, [*marks[1:], None]):
        content = text[mark.end() : following.start() if following else len(text)]
        if mark.lastgroup == "assistant":
            if following is None and not content:
                break
            content = content.removesuffix("\n").removesuffix(END_TOKEN)
        messages.append({"role": mark.lastgroup, "content": content.removesuffix("\n")})
    return read_conversation(messages, tuple(MEDIA_TOKENS))


def _content_text(content: Any, media: Mapping[str, str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content {short(content)}: expected a string or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif isinstance(kind, str) and kind in media:
            parts.append(media[kind])
        else:
            raise ValueError(
                f'content part {short(part)}: expected {{"type": "video"}} or {{"type": "text", "text": ...}}'
            )
    return "".join(parts)
