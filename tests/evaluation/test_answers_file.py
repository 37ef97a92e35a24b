"""The file of answers: what was written stays, what was cut is asked again, and what is foreign is left alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hybridprune_megatron.evaluation.answers_file import Answer, AnswersFile, read_answers

HOW = {"model": "runs/m", "overrides": "", "budget": 0.25, "max_new_tokens": 8}
ONE = Answer("one", ["a.mp4"], "Which \u732b?", None, "this\none", **HOW)
TWO = replace(ONE, key="two", answer="that")


def write(path: Path, *answers: Answer) -> None:
    with AnswersFile(path, HOW) as file:
        for answer in answers:
            file.add([answer])


def test_answers_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    assert read_answers(path, HOW) == (set(), 0)
    write(path, ONE)
    with AnswersFile(path, HOW) as file:
        assert file.asked == {ONE.asked}
        file.add([TWO])
        # Through to the disk, whatever happens next.
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == [asdict(ONE), asdict(TWO)]
        assert file.asked == {ONE.asked, TWO.asked}
        with pytest.raises(ValueError, match="is being written by another process"), AnswersFile(path, HOW):
            pass
    assert read_answers(path, HOW) == ({ONE.asked, TWO.asked}, path.stat().st_size)


@pytest.mark.parametrize("cut", [1, 2, 30, 9999])
def test_a_line_that_was_cut_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, ONE, TWO)
    whole = path.read_bytes()
    last = len(json.dumps(asdict(TWO), ensure_ascii=False).encode()) + 1
    # Down to the first byte of the last line.
    path.write_bytes(whole[: max(len(whole) - cut, len(whole) - last + 1)])
    write(path, TWO)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"mine\n",
        b"mine",
        b'{"key": 1}',
        b"[]\n",
        b'{"key": "one"}\n',
        json.dumps(asdict(ONE) | {"more": 1}).encode() + b"\n",
        json.dumps(asdict(ONE) | {"videos": "a"}).encode() + b"\n",
        json.dumps(asdict(ONE)).encode() + b"\nmine",
        b"\xff\n",
    ],
)
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"line \d was not written by hybridprune predict") as caught:
        write(path, ONE)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value"), [("model", "runs/x"), ("budget", 0.5), ("overrides", "a=b"), ("max_new_tokens", 9)]
)
def test_answers_of_another_model_are_not_mixed(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, ONE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"holds answers with {name}="):
        read_answers(path, HOW | {name: value})
    assert path.read_bytes() == before


def test_nothing_is_left_where_nothing_was_answered(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is not a file"):
        read_answers(tmp_path, HOW)
