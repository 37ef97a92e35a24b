"""Foreign JSON: what is right is read, everything else is one line."""

from __future__ import annotations

import os

import pytest

from hybridprune_megatron.config.json_text import is_plain, parse_json, read_json, short


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ', "Expecting value"),
        ('"\\ud800"', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("9" * 5_000, "digits"),
        ("1e999", "too large"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("", "Expecting value"),
    ],
)
def test_what_is_wrong_is_one_line(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        parse_json(text)
    assert type(raised.value) is not UnicodeDecodeError
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 300


def test_a_byte_order_mark_and_surrogate_pairs_are_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_json('{"a": [1, 2.5, true, null]}') == {"a": [1, 2.5, True, None]}


def test_infinity_is_taken_where_it_may_be_and_nan_never() -> None:
    assert parse_json("[0.0, Infinity, -Infinity]", infinity=True) == [0.0, float("inf"), float("-inf")]
    with pytest.raises(ValueError, match="NaN is not a number"):
        parse_json("[NaN]", infinity=True)


def test_a_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read \(No such file"):
        read_json(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.json")
    for nothing in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read \(not a file"):
            read_json(nothing)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json cannot be read \(Expecting"):
        read_json(tmp_path / "bad.json")


def test_a_value_is_shown_on_one_short_line() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "a\nb" * 10**6, ["y" * 10**6] * 10**3, {"k" * 10**6: [1] * 10**6}, "\ud800"):
        shown = short(value)
        assert len(shown) < 400
        assert shown.isprintable()
    assert short({"role": "user"}) == "{'role': 'user'}"


def test_a_plain_name_is_any_text_on_one_line() -> None:
    assert all(map(is_plain, ("a b.mp4", "3.02\u202fPM", "\xa0", "\u732b", "\U0001f600", "e\u0301", "")))
    assert not any(map(is_plain, ("a\nb", "\r", "\t", "\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ud800", "\udc80")))
