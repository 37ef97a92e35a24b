"""Questions about images, of a data set and of a file of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridprune_megatron.data.left_out import LeftOut
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.evaluation.asked import read_questions
from hybridprune_megatron.evaluation.held_out import read_clips
from hybridprune_megatron.evaluation.predicting import Questions, rows_of_file
from tests.data.test_stored_images import picture, said
from tests.hostile.folders import config


def test_a_stored_question_shows_its_images(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", "val") as writer:
        writer.add("one", said("<image>\nWhich?"), [("png", picture(0))])
        writer.add(
            "two", [*said("<image>?"), *said("And <image>?")], [("png", picture(0)), ("jpg", picture(1, "JPEG"))]
        )
        writer.add("bad", said("<image>?"), [("png", b"no image")])
    with pytest.raises(ValueError, match="has an image; an evaluation needs one video"):
        next(read_clips(tmp_path / "set"))
    left_out = LeftOut()
    encoder = SampleEncoder(config(Path("none")))
    one, two = read_questions(tmp_path / "set", encoder, 5, left_out)
    assert [one.about.question, two.about.question] == ["Which?", "And ?"]
    assert [len(one.prompt.pixel_values), len(two.prompt.pixel_values)] == [1, 2]
    assert left_out.left_out == {"video": 1}


def test_a_row_is_asked_about_its_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    rows = [
        {"image": "a.png", "question": "What is it?"},
        {"image": "a.png", "audio": "a.wav", "question": "What is it?"},
        {"image": "none.png", "question": "What is it?"},
        {"messages": said("<image>?")},
        {"image": "a.png", "messages": said("<video>?")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = LeftOut()
    questions = Questions(tmp_path, SampleEncoder(config(Path("none"))), left_out)
    waiting = [questions.waiting(named, set()) for named in rows_of_file(tmp_path / "rows.jsonl")]
    assert waiting[0] is not None
    assert waiting[0].question == "What is it?"
    assert len(waiting[0].prompt.pixel_values) == 1
    assert waiting[1:] == [None] * 4
    assert left_out.left_out == {"media": 1, "video": 2, "conversation": 1}
