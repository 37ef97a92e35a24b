"""Questions of any data set: the prompt of a stored sample up to its last answer, and what is known of that answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from hybridprune_megatron.config.data_sets import read_data_sets
from hybridprune_megatron.config.stores import local
from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.conversation import (
    MEDIA_PATTERN,
    Conversation,
    check_media,
    media_types,
    read_conversation,
)
from hybridprune_megatron.data.known import Known
from hybridprune_megatron.data.left_out import LeftOut
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.stored_media import kinds_of
from hybridprune_megatron.data.stored_samples import StoredSample, read_samples
from hybridprune_megatron.data.validation_set import shares_of


@dataclass(frozen=True)
class About:
    """A question as text.

    Attributes:
        key: of its sample.
        question: without the placeholders of videos.
        answer: the right one.
        choices: of which the right one is, if the data set says so.
        kind: of the question, if the data set says so.
    """

    key: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question that a model can be asked.

    Attributes:
        about: the same as text.
        prompt: up to the answer, without labels.
        said: tokens of the conversation's own answer, its end included; of the right one where it has none.
        choices: tokens of each choice, ends included.
    """

    about: About
    prompt: EncodedSample
    said: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def asked_turn(conversation: Conversation, known: Known) -> tuple[Conversation, str | None]:
    """The question that is asked, after the turns before it, and the conversation's answer to it.

    It is the last one, unless the right answer is what the conversation says earlier and not at its end: then it is
    that one.
    """
    turn, answers = len(conversation.questions) - 1, conversation.answers
    if known.answer in answers and (len(answers) <= turn or answers[turn] != known.answer):
        turn = answers.index(known.answer)
    asked = replace(conversation, questions=conversation.questions[: turn + 1], answers=answers[:turn])
    return asked, answers[turn] if turn < len(answers) else None


def question_text(conversation: Conversation) -> str:
    """The last question without the placeholders of videos and images."""
    return MEDIA_PATTERN.sub("", conversation.questions[-1]).strip()


def read_asked(stored: StoredSample, encoder: SampleEncoder) -> Asked:
    """The question of a stored sample.

    Raises:
        BadSampleError: it cannot be used, or nobody says what is right.
    """
    key = stored.key
    try:
        kinds = kinds_of(stored.videos)
        conversation = read_conversation(stored.messages, media_types(kinds))
        check_media(conversation, kinds)
        # An answer that a list of choices must hold may be the conversation's own.
        answered = len(conversation.answers) == len(conversation.questions)
        known = Known.of(stored.meta, conversation.answers[-1] if answered else None)
    except ValueError as error:
        raise BadSampleError("malformed", key, str(error)) from error
    conversation, own = asked_turn(conversation, known)
    right = known.answer if known.answer is not None else own
    if right is None or not right.strip():
        raise BadSampleError("malformed", key, "it has no answer, in its conversation or under meta")
    prompt = encoder.prompt(key, conversation, stored.videos[: conversation.num_videos])
    about = About(key, question_text(conversation), right, known.choices, known.kind)
    said = encoder.answer_ids(key, right if own is None or not own.strip() else own)
    return Asked(about, prompt, said, tuple(encoder.answer_ids(key, choice) for choice in known.choices))


def read_questions(data: Path, encoder: SampleEncoder, count: int, left_out: LeftOut) -> Iterator[Asked]:
    """The questions of the first samples of a data set that can be used, one after another; the others are counted.

    Args:
        data: a folder, all of whose shards are read, or the .yaml of a blend, whose held-out shards are; each part of a
            blend gives as many questions as its weight says.
        count: questions at most.

    Raises:
        ValueError: no shards, or none of their samples can be read.
    """
    for stored, share in _parts(data, count, left_out):
        yield from islice(_usable(stored, encoder, left_out), share)


def _usable(stored: Iterator[StoredSample], encoder: SampleEncoder, left_out: LeftOut) -> Iterator[Asked]:
    for sample in stored:
        try:
            yield read_asked(sample, encoder)
        except BadSampleError as error:
            left_out.leave_out(error.reason, str(error))


def _parts(data: Path, count: int, left_out: LeftOut) -> Iterator[tuple[Iterator[StoredSample], int]]:
    """The samples of every folder of a data set, and how many of them to take."""

    def unreadable(line: str) -> None:
        left_out.leave_out("malformed", line)

    if not data.is_file():
        yield read_samples(data, unreadable), count
        return
    sets = read_data_sets(data, "val", "data")
    for each, share in zip(sets, shares_of(sets, count)):
        folder = local(each.folder, "data")
        samples = read_samples(folder, unreadable, [folder / name for name, _ in each.shards])
        yield (sample for sample in samples if f"{sample.shard.name}/{sample.key}" not in each.excluded), share
