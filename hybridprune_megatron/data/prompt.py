"""From a conversation and frame shown to tokens, labels and the layout of the sample.

The same code builds training samples and inference prompts, so that both see the same tokens. Text is tokenized in
pieces that end where a special token, a question or an answer starts or ends; a span therefore never cuts a token.

The format is in ``conversation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hybridprune_megatron.config.json_text import short
from hybridprune_megatron.data.batch import IGNORE_LABEL
from hybridprune_megatron.data.conversation import (
    END_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    MEDIA_PATTERN,
    MEDIA_TOKENS,
    RESERVED_TOKENS,
    SYSTEM_TOKEN,
    TURN_TOKEN,
    Conversation,
    check_videos,
    read_conversation,
)
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

CONVERSATION_MODES = ("first_question", "split_turns", "all_turns")
#: Characters of a text that may repeat from sample to sample.
_MOST_REPEATED = 200
#: What of a medium is shown: of a video the times of its frames in seconds, of an image the number of its tiles.
Shown = Sequence[float] | int
DEFAULT_FRAME_TEXT = "Frame {index} sampled at {seconds:.2f} seconds: "


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
        self._reserved = {number: token for token, number in self._special.items()}
        self._tokenizer = tokenizer
        # Frame texts and role names repeat in every sample; tokenizing them again would dominate short samples.
        self._repeated = lru_cache(maxsize=4096)(self._text_ids)

    @property
    def end_id(self) -> int:
        """Token that ends an answer."""
        return self._special[END_TOKEN]

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return self._repeated(text) if len(text) <= _MOST_REPEATED else self._text_ids(text)

    def _text_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of text, which never are those that the prompt format writes.

        Compared here and not as text alone: a normalizer or an added token may make one of them of other text.
        """
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if not self._reserved.keys().isdisjoint(ids):
            token = next(self._reserved[each] for each in ids if each in self._reserved)
            raise ValueError(
                f"text {short(text)} holds what the tokenizer reads as {token}: reserved for the prompt format; remove "
                "it from the text"
            )
        return ids

    def encode_prompt(
        self, conversation: Conversation, shown: Sequence[Shown], mode: str = "first_question"
    ) -> EncodedPrompt:
        """A prompt that ends with the assistant's marker, for inference.

        Args:
            conversation: has one more question than answers.
            shown: what of every medium.
            mode: which questions score, as in training: the first, the last (``split_turns``) or all of them.
        """
        turns = len(conversation.questions)
        if len(conversation.answers) != turns - 1:
            raise ValueError(f"the conversation ends with an answer ({turns} turns): a prompt ends with a question")
        return self._encode(conversation, shown, _scoring_turns(mode, turns), range(0))

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of an answer, as training writes it: its text, one newline and its end."""
        return (*self._tokenize(text + "\n"), self._special[END_TOKEN])

    def encode_next_turn(self, question: str, closed: bool = True) -> list[int]:
        """What follows an answer: the next question, up to the marker of its answer.

        Args:
            question: text without a video.
            closed: whether the answer has its end token; False writes it first.

        Raises:
            ValueError: the question holds a video, an image or a reserved token.
        """
        conversation = read_conversation([{"role": "user", "content": question}], tuple(MEDIA_TOKENS))
        if conversation.num_videos:
            raise ValueError("a question over filled caches holds a video or an image: prefill the whole chat for it")
        pieces = _Pieces()
        if not closed:
            self._text(pieces, "\n")
            self._special_token(pieces, END_TOKEN)
        self._text(pieces, "\n")
        self._user_turn(pieces, conversation.questions[0], TokenKind.TEXT, (), 0)
        return pieces.ids

    def encode_samples(
        self, conversation: Conversation, shown: Sequence[Shown], mode: str = "first_question"
    ) -> list[EncodedPrompt]:
        """Training samples: one, or one per turn with ``split_turns``.

        Args:
            conversation: every question has its answer.
            shown: what of every medium.
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
            used = shown[: part.num_videos] if part is not conversation else shown
            sample = self._encode(part, used, _scoring_turns(mode, len(part.questions)), loss_turns)
            if sample.num_videos and not sample.layout.count(TokenKind.QUESTION):
                raise ValueError("the sample shows a video but its question has no text: nothing to score frames with")
            samples.append(sample)
        return samples

    def _encode(
        self,
        conversation: Conversation,
        shown: Sequence[Shown],
        scoring_turns: range,
        loss_turns: range,
    ) -> EncodedPrompt:
        check_videos(conversation, len(shown))
        pieces = _Pieces()
        if conversation.system is not None:
            self._special_token(pieces, SYSTEM_TOKEN)
            self._text(pieces, f"System\n{conversation.system}\n")
        video = 0
        for turn, question in enumerate(conversation.questions):
            if turn:
                self._text(pieces, "\n")
            kind = TokenKind.QUESTION if turn in scoring_turns else TokenKind.TEXT
            video = self._user_turn(pieces, question, kind, shown, video)
            if turn < len(conversation.answers):
                loss = turn in loss_turns
                kind = TokenKind.ANSWER if loss else TokenKind.TEXT
                pieces.add(self.answer_ids(conversation.answers[turn]), kind, loss=loss)
        return pieces.finish(num_videos=video)

    def _user_turn(self, pieces: _Pieces, content: str, kind: TokenKind, shown: Sequence[Shown], video: int) -> int:
        """Writes a user turn and the assistant's marker; returns the number of videos written so far."""
        self._special_token(pieces, TURN_TOKEN)
        video = self._question(pieces, content, kind, shown, video)
        self._special_token(pieces, TURN_TOKEN)
        self._text(pieces, "Assistant\n")
        return video

    def _question(self, pieces: _Pieces, content: str, kind: TokenKind, shown: Sequence[Shown], video: int) -> int:
        """Writes one user content; returns the number of videos written so far."""
        before = "User\n"
        texts = MEDIA_PATTERN.split(content)
        for position, text in enumerate(texts):
            last = position == len(texts) - 1
            if position:
                self._medium(pieces, before, shown[video], video)
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
        # is not part of the question where the tokenizer keeps it apart.
        ids, newline = self._tokenize(text), self._tokenize("\n")
        if text.endswith("\n") and len(ids) > len(newline) and ids[-len(newline) :] == newline:
            pieces.add(ids[: -len(newline)], kind)
            pieces.add(newline, TokenKind.TEXT)
        else:
            pieces.add(ids, kind)

    def _medium(self, pieces: _Pieces, before: str, shown: Shown, number: int) -> None:
        """Writes the frames of a video, each with its time, or the tiles of an image, side by side."""
        if isinstance(shown, int):
            # Tiles are not frames of one video: each stands for itself.
            self._frames(pieces, before, [(pieces.new_video(), 0) for _ in range(shown)])
            return
        if not shown:
            raise ValueError(f"video {number} has no frames")
        video = pieces.new_video()
        for frame, time in enumerate(shown):
            self._frames(pieces, before + self.frame_text.format(index=frame + 1, seconds=time), [(video, frame)])
            before = "\n"

    def _frames(self, pieces: _Pieces, before: str, frames: Sequence[tuple[int, int]]) -> None:
        """Writes frames between one pair of marks; each is the number of its video and its own."""
        self._text(pieces, before)
        self._special_token(pieces, IMAGE_START_TOKEN)
        tokens = (self._special[IMAGE_TOKEN],) * self.tokens_per_frame
        for video, frame in frames:
            pieces.add(tokens, TokenKind.FRAME, video=video, frame=frame)
        self._special_token(pieces, IMAGE_END_TOKEN)

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
    videos: int = 0

    def new_video(self) -> int:
        """A number for the spans of another video, or of a tile."""
        self.videos += 1
        return self.videos - 1

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
    turns = {"first_question": range(1), "split_turns": range(num_turns - 1, num_turns), "all_turns": range(num_turns)}
    if mode not in turns:
        raise ValueError(f"data.conversation={mode!r}: choose one of {', '.join(CONVERSATION_MODES)}")
    return turns[mode]
