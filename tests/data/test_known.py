"""What rows say about their answers: read, kept in a sample's meta, and refused where it cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.data.known import Known
from hybridprune_megatron.data.rows import BadRowError, check_row, known_of, read_row
from hybridprune_megatron.data.stored_samples import read_samples
from scripts.make_shards import main as make_shards
from tests.data.conftest import encode_clip, grey_frames

SAID = [{"role": "user", "content": "<video>\nWhich grey?"}, {"role": "assistant", "content": "dark"}]
CHOICES = ["dark", "light"]


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({}, Known()),
        ({"answer": None, "choices": None, "kind": None}, Known()),
        ({"choices": CHOICES}, Known(choices=("dark", "light"))),
        (
            {"answer": "light", "choices": CHOICES, "kind": "shade", "other": 3},
            Known("light", ("dark", "light"), "shade"),
        ),
        ({"choices": []}, Known()),
    ],
)
def test_what_is_said_is_read_and_written_back(values: dict[str, Any], known: Known) -> None:
    assert Known.of(values, "dark") == known
    assert Known.of(json.loads(json.dumps(known.meta())), "dark") == known
    assert all(known.meta().values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"answer": 3}, "answer 3: expected text"),
        ({"answer": " "}, "answer ' ': expected text"),
        ({"kind": ["shade"]}, "kind"),
        ({"kind": "two\nlines"}, "expected a line of text"),
        ({"kind": "x" * 101}, "at most 100 characters"),
        ({"choices": "dark"}, "expected a list of texts"),
        ({"choices": ["dark", 3]}, "expected a list of texts"),
        ({"choices": ["dark", "dark"]}, "each once"),
        ({"choices": ["dark", *map(str, range(1000))]}, "at most 1000"),
        ({"choices": ["light"]}, "answer 'dark' is none of the choices"),
        ({"choices": CHOICES, "answer": "grey"}, "answer 'grey' is none of the choices"),
        ({"answer": "<image>"}, "holds <image>: reserved"),
        ({"choices": ["dark", "<SPECIAL_12>"]}, "holds <SPECIAL_12>: reserved"),
    ],
)
def test_what_cannot_be_right_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Known.of(values, "dark")
    assert "\n" not in str(caught.value)
    row = read_row(json.dumps({"video": "grey.mp4", "conversations": SAID, **values}).encode())
    with pytest.raises(BadRowError, match=words) as bad:
        known_of(row, check_row(row).answers[-1])
    assert bad.value.reason == "answer"


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"video": "a", "question": "What?", "answer": "dark"}, "<video>\nWhat?"),
        ({"videos": ["a", "b"], "question": "What?", "answer": "dark"}, "<video>\n<video>\nWhat?"),
        ({"video": "a", "question": "In <video>, what?", "answer": "dark"}, "In <video>, what?"),
        ({"question": "What?", "answer": "dark"}, "What?"),
    ],
)
def test_a_question_is_a_conversation(row: dict[str, Any], content: str) -> None:
    read = read_row(json.dumps(row).encode())
    assert check_row(read).messages() == [{"role": "user", "content": content}, SAID[1]]
    without = read_row(json.dumps({name: value for name, value in row.items() if name != "answer"}).encode())
    assert without.messages == [{"role": "user", "content": content}]
    with pytest.raises(BadRowError, match="the last answer is missing"):
        check_row(without)


def test_shards_keep_what_rows_say(tmp_path: Path) -> None:
    (tmp_path / "grey.mp4").write_bytes(encode_clip(grey_frames(5), range(0, 200, 40)))
    video = {"video": "grey.mp4"}
    rows = [
        video | {"conversations": SAID},
        video | {"id": 7, "conversations": SAID, "kind": "shade", "choices": CHOICES},
        video | {"id": "q", "question": "Which grey?", "answer": "light", "choices": CHOICES},
        video | {"id": "bad", "conversations": SAID, "choices": ["light"]},
        video | {"id": "worse", "question": ["Which?"], "answer": "light"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shards(f"--conversations {tmp_path}/rows.jsonl --videos {tmp_path} --out {tmp_path}/set".split())
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["left_out"] == {"answer": 1, "conversation": 1}
    assert report["rows"][0] == "row 4: answer 'dark' is none of the choices ['light']"
    samples = list(read_samples(tmp_path / "set"))
    assert [sample.meta for sample in samples] == [
        {},
        {"id": 7, "answer": "dark", "kind": "shade", "choices": CHOICES},
        {"id": "q", "answer": "light", "choices": CHOICES},
    ]
    assert samples[2].messages == [SAID[0], {"role": "assistant", "content": "light"}]
