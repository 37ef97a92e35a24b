"""From a conversation and frame timestamps to tokens, labels and the layout of the sample.

The same code builds training samples and inference prompts, so that both see the same tokens. Text is tokenized in
pieces that end where a special token, a question or an answer starts or ends; a span therefore never cuts a token.

Format (system turn left out if there is none):

    <SPECIAL_10>System\\n{system}\\n<SPECIAL_11>User\\n{content}\\n<SPECIAL_11>Assistant\\n{answer}\\n<SPECIAL_12>

with a newline between ``<SPECIAL_12>`` and the next turn. ``<video>`` in the user's content becomes the frames of that
video, joined by newlines, then one newline (a newline that directly follows the placeholder is taken for that one):

    Frame 1 sampled at 0.00 seconds: <img><image>...<image></img>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hybridprune_megatron.data.batch import IGNORE_LABEL
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

SYSTEM_TOKEN = "<SPECIAL_10>"
TURN_TOKEN = "<SPECIAL_11>"
END_TOKEN = "<SPECIAL_12>"
IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
VIDEO_TOKEN = "<video>"

#: Special tokens that the prompt itself writes: content that holds one would change the roles or the frame counts.
RESERVED_TOKENS = (SYSTEM_TOKEN, TURN_TOKEN, END_TOKEN, IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
CONVERSATION_MODES = ("first_question", "split_turns", "all_turns")
DEFAULT_FRAME_TEXT = "Frame {index} sampled at {seconds:.2f} seconds: "

_ROLE_MARKERS = {
    "system": f"{SYSTEM_TOKEN}System\n",
    "user": f"{TURN_TOKEN}User\n",
    "assistant": f"{TURN_TOKEN}Assistant\n",
}
_TURN_PATTERN = re.compile("|".join(f"(?P<{role}>{re.escape(marker)})" for role, marker in _ROLE_MARKERS.items()))


@dataclass(frozen=True)
class Conversation:
    """A conversation whose turns alternate.

    Attributes:
        system: text of the system turn, or None.
        questions: user contents, at least one; ``<video>`` stands for a video.
        answers: assistant texts; one fewer than questions in a prompt that waits for its answer.
    """

    system: str | None
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def num_videos(self) -> int:
        return sum(question.count(VIDEO_TOKEN) for question in self.questions)

    def up_to(self, num_turns: int) -> Conversation:
        """The first turns only."""
        return Conversation(self.system, self.questions[:num_turns], self.answers[:num_turns])


@dataclass(frozen=True)
class EncodedPrompt:
    """Tokens of one sample.

    Attributes:
        input_ids: L token ids.
        labels: L targets, shifted: ``labels[i]`` is the token after token i if that has loss, else ``IGNORE_LABEL``.
        layout: what every token is.
        num_videos: how many of the conversation's videos the sample shows (always the first ones).
    """

    input_ids: list[int]
    labels: list[int]
    layout: SampleLayout
    num_videos: int


def read_conversation(messages: Sequence[dict[str, Any]]) -> Conversation:
    """Checks a list of ``{"role", "content"}``; content is a string or a list of ``{"type": "video"|"text"}`` parts.

    Raises:
        ValueError: roles do not alternate, there is no question, or a content holds a reserved token.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"conversation is {messages!r:.60}: expected a list of messages with role and content")
    contents: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {message!r:.60}: expected an object with role and content")
        contents.append((message["role"], _content_text(message["content"])))
    system = contents.pop(0)[1] if contents[0][0] == "system" else None
    expected = ["user", "assistant"] * (len(contents) // 2 + 1)
    roles = [role for role, _ in contents]
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(f"roles {roles}: expected user and assistant in turn, after at most one system message")
    for role, text in contents:
        held = [token for token in RESERVED_TOKENS if token in text]
        if role != "user" and VIDEO_TOKEN in text:
            held.append(VIDEO_TOKEN)
        if held:
            raise ValueError(f"{role} content holds {held[0]}: reserved for the prompt format; remove it from the text")
    texts = [text for _, text in contents]
    return Conversation(system, tuple(texts[0::2]), tuple(texts[1::2]))


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
    return read_conversation(messages)


class PromptEncoder:
    """Turns conversations into tokens for one tokenizer and one frame size.

    Args:
        tokenizer: a Hugging Face tokenizer that knows the special tokens of this module.
        tokens_per_frame: visual tokens of a frame.
        frame_text: template written before every frame, with ``{index}`` (from 1) and ``{seconds}``.

    Raises:
        ValueError: the tokenizer lacks a special token, or the template has an unknown field.
    """

    def __init__(self, tokenizer: Any, tokens_per_frame: int, frame_text: str = DEFAULT_FRAME_TEXT) -> None:
        if tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame={tokens_per_frame}: a frame has at least one token")
        try:
            frame_text.format(index=1, seconds=0.0)
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(
                f"data.frame_text={frame_text!r} cannot be filled ({error!r}): it may use {{index}} and {{seconds:.2f}}"
            ) from error
        self.tokens_per_frame = tokens_per_frame
        self.frame_text = frame_text
        self._special = {token: special_token_id(tokenizer, token) for token in RESERVED_TOKENS}
        # Frame texts and role names repeat in every sample; tokenizing them again would dominate short samples.
        self._tokenize = lru_cache(maxsize=4096)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    def encode_prompt(
        self, conversation: Conversation, timestamps: Sequence[Sequence[float]], mode: str = "first_question"
    ) -> EncodedPrompt:
        """A prompt that ends with the assistant's marker, for inference.

        Args:
            conversation: has one more question than answers.
            timestamps: for every video its frame times in seconds.
            mode: which questions score, as in training: the first, the last (``split_turns``) or all of them.
        """
        turns = len(conversation.questions)
        if len(conversation.answers) != turns - 1:
            raise ValueError(f"the conversation ends with an answer ({turns} turns): a prompt ends with a question")
        return self._encode(conversation, timestamps, _scoring_turns(mode, turns), range(0))

    def encode_samples(
        self, conversation: Conversation, timestamps: Sequence[Sequence[float]], mode: str = "first_question"
    ) -> list[EncodedPrompt]:
        """Training samples: one, or one a turn with ``split_turns``.

        Args:
            conversation: every question has its answer.
            timestamps: for every video its frame times in seconds.
            mode: ``first_question``: the first question scores, every answer carries loss. ``split_turns``: every turn
                is a sample whose own question scores and whose own answer carries loss, after the earlier turns as
                plain text. ``all_turns``: every question scores, every answer carries loss. Later questions then
                also choose tokens for earlier answers, which a user's first question never sees; it is the cheap
                way to train on many questions about one video.

        Raises:
            ValueError: an answer is missing or empty, a video has no question, or videos do not fit the placeholders.
        """
        turns = len(conversation.questions)
        if len(conversation.answers) != turns:
            raise ValueError(f"{turns} questions and {len(conversation.answers)} answers: the last answer is missing")
        if not all(conversation.answers):
            raise ValueError("an answer is empty: nothing to learn from; remove the turn")
        if mode == "split_turns":
            parts = [(conversation.up_to(turn + 1), range(turn, turn + 1)) for turn in range(turns)]
        else:
            parts = [(conversation, range(turns))]
        samples = []
        for part, loss_turns in parts:
            used = timestamps[: part.num_videos] if part is not conversation else timestamps
            sample = self._encode(part, used, _scoring_turns(mode, len(part.questions)), loss_turns)
            if sample.num_videos and not sample.layout.count(TokenKind.QUESTION):
                raise ValueError("the sample shows a video but its question has no text: nothing to score frames with")
            samples.append(sample)
        return samples

    def _encode(
        self,
        conversation: Conversation,
        timestamps: Sequence[Sequence[float]],
        scoring_turns: range,
        loss_turns: range,
    ) -> EncodedPrompt:
        if conversation.num_videos != len(timestamps):
            raise ValueError(f"{conversation.num_videos} {VIDEO_TOKEN} placeholders but {len(timestamps)} videos")
        pieces = _Pieces()
        if conversation.system is not None:
            self._special_token(pieces, SYSTEM_TOKEN)
            self._text(pieces, f"System\n{conversation.system}\n")
        video = 0
        for turn, question in enumerate(conversation.questions):
            if turn:
                self._text(pieces, "\n")
            self._special_token(pieces, TURN_TOKEN)
            kind = TokenKind.QUESTION if turn in scoring_turns else TokenKind.TEXT
            video = self._question(pieces, question, kind, timestamps, video)
            self._special_token(pieces, TURN_TOKEN)
            self._text(pieces, "Assistant\n")
            if turn < len(conversation.answers):
                loss = turn in loss_turns
                kind = TokenKind.ANSWER if loss else TokenKind.TEXT
                pieces.add(self._tokenize(conversation.answers[turn] + "\n"), kind, loss=loss)
                pieces.add((self._special[END_TOKEN],), kind, loss=loss)
        return pieces.finish(num_videos=video)

    def _question(
        self, pieces: _Pieces, content: str, kind: TokenKind, timestamps: Sequence[Sequence[float]], video: int
    ) -> int:
        """Writes one user content; returns the number of videos written so far."""
        before = "User\n"
        texts = content.split(VIDEO_TOKEN)
        for position, text in enumerate(texts):
            last = position == len(texts) - 1
            if position:
                self._video(pieces, before, timestamps[video], video)
                video, before = video + 1, "\n"
                text = text.removeprefix("\n")
            if text or last:
                self._text(pieces, before)
                before = ""
            if text:
                self._question_text(pieces, text + "\n" * last, kind)
            elif last:
                self._text(pieces, "\n")
        return video

    def _question_text(self, pieces: _Pieces, text: str, kind: TokenKind) -> None:
        # The newline that closes the content is tokenized with it, as a model trained on whole prompts expects, but it
        # is no part of the question where the tokenizer keeps it apart.
        ids, newline = self._tokenize(text), self._tokenize("\n")
        if text.endswith("\n") and len(ids) > len(newline) and ids[-len(newline) :] == newline:
            pieces.add(ids[: -len(newline)], kind)
            pieces.add(newline, TokenKind.TEXT)
        else:
            pieces.add(ids, kind)

    def _video(self, pieces: _Pieces, before: str, seconds: Sequence[float], video: int) -> None:
        if not seconds:
            raise ValueError(f"video {video} has no frames")
        image = (self._special[IMAGE_TOKEN],) * self.tokens_per_frame
        for frame, time in enumerate(seconds):
            self._text(pieces, before + self.frame_text.format(index=frame + 1, seconds=time))
            self._special_token(pieces, IMAGE_START_TOKEN)
            pieces.add(image, TokenKind.FRAME, video=video, frame=frame)
            self._special_token(pieces, IMAGE_END_TOKEN)
            before = "\n"

    def _text(self, pieces: _Pieces, text: str) -> None:
        pieces.add(self._tokenize(text), TokenKind.TEXT)

    def _special_token(self, pieces: _Pieces, token: str) -> None:
        pieces.add((self._special[token],), TokenKind.TEXT)


@dataclass
class _Pieces:
    """Collects token runs; runs of one kind in a row become one span, frames stay apart."""

    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: TokenKind, loss: bool = False, video: int = -1, frame: int = -1) -> None:
        if not ids:
            return
        self.ids.extend(ids)
        self.loss.extend([loss] * len(ids))
        length = len(ids)
        if self.spans and (self.spans[-1].kind, self.spans[-1].video, self.spans[-1].frame) == (kind, video, frame):
            length += self.spans.pop().num_tokens
        self.spans.append(Span(kind, length, video, frame))

    def finish(self, num_videos: int) -> EncodedPrompt:
        following = zip(self.ids[1:], self.loss[1:])
        labels = [token if loss else IGNORE_LABEL for token, loss in following] + [IGNORE_LABEL]
        return EncodedPrompt(self.ids, labels, SampleLayout(tuple(self.spans)), num_videos)


def special_token_id(tokenizer: Any, token: str) -> int:
    """Id of a special token.

    Raises:
        ValueError: the tokenizer does not know it as one token.
    """
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token}: data.tokenizer must hold {', '.join(RESERVED_TOKENS)}")
    return int(ids[0])


def _scoring_turns(mode: str, num_turns: int) -> range:
    if mode == "first_question":
        return range(1)
    if mode == "split_turns":
        return range(num_turns - 1, num_turns)
    if mode == "all_turns":
        return range(num_turns)
    raise ValueError(f"data.conversation={mode!r}: choose one of {', '.join(CONVERSATION_MODES)}")


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content {content!r:.60}: expected a string or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "video":
            parts.append(VIDEO_TOKEN)
        else:
            raise ValueError(
                f'content part {part!r:.60}: expected {{"type": "video"}} or {{"type": "text", "text": ...}}'
            )
    return "".join(parts)
