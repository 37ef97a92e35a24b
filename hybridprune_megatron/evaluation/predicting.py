"""Questions about videos that are files, read as rows, and a model's greedy answers to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from hybridprune_megatron.data.batch import EncodedSample
from hybridprune_megatron.data.conversation import VIDEO_TOKEN
from hybridprune_megatron.data.known import Known
from hybridprune_megatron.data.left_out import LeftOut
from hybridprune_megatron.data.row_files import rows_at
from hybridprune_megatron.data.rows import BadRowError, Row, row_conversation, unique_key
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.stored_media import stored
from hybridprune_megatron.data.video_folder import VideoFolder, videos_below
from hybridprune_megatron.evaluation.answering import AnsweringModel
from hybridprune_megatron.evaluation.answers_file import Answer, AnswersFile
from hybridprune_megatron.evaluation.asked import asked_turn, question_text
from hybridprune_megatron.method.reduction import Reduction


@dataclass(frozen=True)
class NamedRow:
    """A row with what it is called.

    Attributes:
        key: in the file of answers.
        where: in messages.
        row: what it says; None: it is malformed, and ``error`` says how.
        error: see there.
    """

    key: str
    where: str
    row: Row | None
    error: BadRowError | None = None


@dataclass(frozen=True)
class Waiting:
    """A question that can be asked, with all that its answer will say."""

    key: str
    row: Row
    question: str
    answer: str | None
    prompt: EncodedSample


def rows_of_videos(folder: Path, question: str) -> list[NamedRow]:
    """A row for every video below a folder, in order; each is asked the same.

    Raises:
        ValueError: there is none.
    """
    names = videos_below(folder)
    if not names:
        raise ValueError(f"videos={folder}: no video is there, or below; give a folder with videos")
    content = question if VIDEO_TOKEN in question else f"{VIDEO_TOKEN}\n{question}"
    return [NamedRow(name, name, Row(name, [{"role": "user", "content": content}], [name])) for name in names]


def rows_of_file(path: Path) -> Iterator[NamedRow]:
    """The rows of a JSONL file, a JSON array or a table, as ``hybridprune shards`` reads them."""
    keys: set[str] = set()
    for number, read in rows_at(path).each:
        try:
            row = read()
        except BadRowError as error:
            yield NamedRow("", f"row {number}", None, error)
            continue
        keys.add(key := unique_key(row.id, number, keys))
        yield NamedRow(key, f"row {number}", row)


class Questions:
    """What of some rows is still to be asked.

    Args:
        folder: of their videos.
        encoder: makes prompts of them.
        left_out: counts those that cannot be used.
    """

    def __init__(self, folder: Path, encoder: SampleEncoder, left_out: LeftOut) -> None:
        self._videos = VideoFolder(folder, whole=False)
        self._encoder, self._left_out = encoder, left_out

    def waiting(self, named: NamedRow, asked: set[tuple[Any, ...]]) -> Waiting | None:
        """The prompt of a row; None for one that has its answer already, or that is left out.

        Args:
            asked: ``Answer.asked`` of those that have.
        """
        try:
            if named.row is None:
                assert named.error is not None, named
                raise named.error
            return self._waiting(named.key, named.row, asked)
        except (BadRowError, BadSampleError) as error:
            self._left_out.leave_out(error.reason, f"{named.where}: {error}")
            return None

    def _waiting(self, key: str, row: Row, asked: set[tuple[Any, ...]]) -> Waiting | None:
        answer = row.known.get("answer")
        right = answer if isinstance(answer, str) else None
        conversation, own = asked_turn(row_conversation(row), Known(right))
        question = question_text(conversation)
        if (key, tuple(row.videos), question) in asked:
            return None
        # Of a conversation that was cut, later videos are not shown.
        files = [stored(*file) for file in self._videos.read(row.videos[: conversation.num_videos])]
        prompt = self._encoder.prompt(key, conversation, files)
        return Waiting(key, row, question, own if right is None else right, prompt)


def predict(
    model: AnsweringModel,
    rows: Iterator[NamedRow],
    questions: Questions,
    reduction: Reduction | None,
    file: AnswersFile,
    how: dict[str, Any],
    encoder: SampleEncoder,
    batch_size: int,
    progress: Any,
) -> int:
    """Asks what is still to be asked, a batch at a time, and writes every batch before the next one.

    Args:
        rows: all of them, those of an earlier call too.
        reduction: what to drop; None: nothing.
        file: open; knows what has been answered.
        how: model, overrides, budget and max_new_tokens, for its lines.
        progress: its ``update`` gets the number of rows that are done, whatever became of them.

    Returns:
        The number of answers written.
    """
    count = 0
    for batch in batched(_progressing(rows, questions, file.asked, progress), batch_size):
        packed, hidden = model.embedded([each.prompt for each in batch])
        prefilled = model.prefilled(packed, hidden, reduction)
        written = model.written(prefilled, encoder.end_id, how["max_new_tokens"])
        texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        file.add(
            Answer(each.key, each.row.videos, each.question, each.answer, text, **how)
            for each, text in zip(batch, texts)
        )
        progress.update(len(batch))
        count += len(batch)
    return count


def _progressing(
    rows: Iterator[NamedRow], questions: Questions, asked: set[tuple[Any, ...]], progress: Any
) -> Iterator[Waiting]:
    """The questions that wait; all others are done at once."""
    for named in rows:
        waiting = questions.waiting(named, asked)
        if waiting is None:
            progress.update(1)
        else:
            yield waiting
