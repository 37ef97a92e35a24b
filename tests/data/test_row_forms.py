"""Rows in the forms that people have: each is read as it is meant, or is a bad row with its reason."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from hybridprune_megatron.data.rows import BadRowError, check_row, read_row

SAID = {"role": "assistant", "content": "Red."}
GPT = {"from": "gpt", "value": "Red."}
ASKED = "<video>\nWhat colour?"


def human(text: str) -> list[dict[str, Any]]:
    return [{"from": "human", "value": text}, GPT]


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, SAID]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def read(row: Any) -> tuple[list[dict[str, str]], list[str]]:
    """What training gets of a row: messages, and the paths of the videos."""
    found = read_row(json.dumps(row).encode())
    return check_row(found).messages(), found.videos


READ: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "llava": ({"video": "a.mp4", "conversations": human(ASKED)}, ASKED, ["a.mp4"]),
    "llava-video": ({"video": "a.mp4", "conversations": human("<image>\nWhat?")}, "<video>\nWhat?", ["a.mp4"]),
    "llava-video, two": (
        {"video": ["a.mp4", "b.mp4"], "conversations": human("<image><image>Which?")},
        "<video><video>Which?",
        ["a.mp4", "b.mp4"],
    ),
    "sharegpt of llama-factory": (
        {"videos": ["a.mp4"], "conversations": human(ASKED), "system": "", "tools": ""},
        ASKED,
        ["a.mp4"],
    ),
    "llama-factory": (
        {"videos": ["a.mp4"], "messages": [{"role": "user", "content": ASKED}, SAID], "images": [], "audios": None},
        ASKED,
        ["a.mp4"],
    ),
    "openai, a text": ({"messages": [{"role": "user", "content": "What?"}, SAID]}, "What?", []),
    "openai, an url in an object": (
        user({"type": "video_url", "video_url": {"url": "a.mp4"}}, text("What?")),
        "<video>What?",
        ["a.mp4"],
    ),
    "openai, an url": (user({"type": "video_url", "video_url": "a.mp4"}, "What?"), "<video>What?", ["a.mp4"]),
    "a local address": (
        user({"type": "video", "video": "file:///clips/my%20cat.mp4"}, text("What?")),
        "<video>What?",
        ["/clips/my cat.mp4"],
    ),
    "qwen": (user({"type": "video", "video": "a.mp4", "fps": 2.0}, text("What?")), "<video>What?", ["a.mp4"]),
    "transformers": (
        user({"type": "video", "path": "a.mp4"}, {"type": "video", "url": "file://localhost/b.mp4"}, text("Which?")),
        "<video><video>Which?",
        ["a.mp4", "/b.mp4"],
    ),
    "parts without a name": (
        {**user({"type": "video"}, text("What?")), "videos": ["a.mp4"]},
        "<video>What?",
        ["a.mp4"],
    ),
    "named twice": (
        {**user({"type": "video", "video": "a.mp4"}, text("What?")), "videos": ["a.mp4"]},
        "<video>What?",
        ["a.mp4"],
    ),
    "parts of a table, every key in each": (
        user({"type": "video", "text": None, "video": "a.mp4"}, {"type": "text", "text": "What?", "video": None}),
        "<video>What?",
        ["a.mp4"],
    ),
    "an image in a text part": ({**user(text("<image>"), text("What?")), "video": "a.mp4"}, "<video>What?", ["a.mp4"]),
    "turns by column": (
        {"video": "a.mp4", "conversations": {"from": ["human", "gpt"], "value": [ASKED, "Red."]}},
        ASKED,
        ["a.mp4"],
    ),
    "a stored video": ({"video": {"bytes": None, "path": "a.mp4"}, "conversations": human(ASKED)}, ASKED, ["a.mp4"]),
    "keys of both, one null": (
        {"video": None, "conversations": None, "messages": [{"role": "user", "content": "What?"}, SAID]},
        "What?",
        [],
    ),
    "llava, an image": ({"image": "a.jpg", "conversations": human("<image>\nWhat?")}, "<image>\nWhat?", ["a.jpg"]),
    "llama-factory, images": (
        {"images": ["a.PNG", "b.webp"], "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID]},
        "<image> or <image>?",
        ["a.PNG", "b.webp"],
    ),
    "openai, an image": (
        user({"type": "image_url", "image_url": {"url": "file:///a.jpg"}}, {"type": "image", "path": "b.jpg"}, "?"),
        "<image><image>?",
        ["/a.jpg", "b.jpg"],
    ),
    "videos and images": (
        {"videos": ["a.mp4", "b.mp4"], "images": "c.jpg", "conversations": human("<video><image><video>Which?")},
        "<video><image><video>Which?",
        ["a.mp4", "c.jpg", "b.mp4"],
    ),
    "some in the row, some in parts": (
        {
            **user({"type": "image"}, {"type": "video", "video": "a.mp4"}, {"type": "image"}, "?"),
            "images": ["b.jpg", "c.jpg"],
        },
        "<image><video><image>?",
        ["b.jpg", "a.mp4", "c.jpg"],
    ),
    "an image's part for a video": ({**user({"type": "image"}, "?"), "video": "a.mp4"}, "<video>?", ["a.mp4"]),
    "media that are not there": (
        {"conversations": human("What?"), "image": None, "audio": {"bytes": None, "path": None}, "num_frames": 8},
        "What?",
        [],
    ),
    "counts and times": ({"conversations": human("What?"), "frames": 8, "video_id": "v1", "duration": 2}, "What?", []),
}


@pytest.mark.parametrize("form", READ)
def test_every_form_is_one_conversation(form: str) -> None:
    row, question, videos = READ[form]
    assert read(row) == ([{"role": "user", "content": question}, SAID], videos)


def test_a_system_text_beside_the_messages_comes_first() -> None:
    row = {"videos": ["a.mp4"], "conversations": human(ASKED), "system": "Be short."}
    assert read(row)[0] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": ASKED}, SAID]
    assert read({"question": "What?", "answer": "Red.", "system": "Be short."})[0][0]["content"] == "Be short."


def test_a_question_is_asked_about_all_that_the_row_shows() -> None:
    row = {"question": "Which?", "answer": "Red.", "image": "a.jpg", "videos": ["b.mp4", "c.mp4"]}
    messages, videos = read(row)
    assert messages[0]["content"] == "<video>\n<video>\n<image>\nWhich?"
    assert videos == ["b.mp4", "c.mp4", "a.jpg"]
    assert read({"question": "<image> is?", "answer": "Red.", "image": "a.jpg"})[0][0]["content"] == "<image> is?"


def test_videos_of_several_turns_keep_their_order() -> None:
    first, second = (
        user({"type": "video", "video": "b.mp4"}, text("What?")),
        user({"type": "video", "video": "a.mp4"}, "?"),
    )
    messages, videos = read({"messages": first["messages"] + second["messages"]})
    assert videos == ["b.mp4", "a.mp4"]
    assert [each["content"] for each in messages] == ["<video>What?", "Red.", "<video>?", "Red."]


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a sound": ({"audio": "a.wav", "conversations": human("What?")}, "media", "'audio': 'a.wav' is not read"),
    "sounds of llama-factory": (
        {"audios": ["a.wav"], "messages": [{"role": "user", "content": "<audio>What?"}, SAID]},
        "media",
        "audios",
    ),
    "a stored image": ({"image": {"bytes": "x", "path": None}, "conversations": human("<image>?")}, "video", "itself"),
    "an image that nothing shows": ({"image": "a.jpg", "conversations": human("What?")}, "video", "0 <video>"),
    "fewer images": (
        {"images": ["a.jpg"], "conversations": human("<image><image>?")},
        "video",
        "2 placeholders of videos and images but 1",
    ),
    "a video in an image's place": (
        {"image": "a.mp4", "images": None, "video": "b.jpg", "conversations": human("<image><video>?")},
        "video",
        "placeholder 1 is <image>, and the type of its file a video's",
    ),
    "an image's place for a video beside an image": (
        {"image": "a.jpg", "video": "b.mp4", "conversations": human("<image><image>?")},
        "video",
        "placeholder 2 is <image>",
    ),
    "an image of the answer": (
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<image>"}]},
        "conversation",
        "<image>: reserved",
    ),
    "two lists of images": ({"image": "a.jpg", "images": ["b.jpg"], "conversations": human("?")}, "video", "give one"),
    "a video under another key": ({"video_path": "a.mp4", "conversations": human("What?")}, "media", "under video or"),
    "a key of another case": ({"Video": "a.mp4", "conversations": human("What?")}, "media", "Video"),
    "media of a message": (
        {"messages": [{"role": "user", "content": "What?", "images": ["a.jpg"]}, SAID]},
        "media",
        "message with 'images'",
    ),
    "a sound's part": (user({"type": "input_audio", "input_audio": {"data": "x"}}, "?"), "media", "input_audio"),
    "media of a text part": (user({"type": "text", "text": "What?", "image": "a.png"}), "media", "part of type 'text'"),
    "a span": (user({"type": "video", "video": "a.mp4", "video_start": 2.0}, "?"), "media", "span of a video"),
    "a web address": ({"video": "https://x.org/a.mp4", "conversations": human(ASKED)}, "video", "is not fetched"),
    "a web address in a part": (
        user({"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}, "?"),
        "video",
        "not fetched",
    ),
    "an image's web address": (
        user({"type": "image_url", "image_url": {"url": "https://x/a.png"}}, "?"),
        "video",
        "not fetched",
    ),
    "bytes in an address": (
        user({"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}, "?"),
        "video",
        "not fetched",
    ),
    "an object store": ({"video": "s3://bucket/a.mp4", "conversations": human(ASKED)}, "video", "is not fetched"),
    "a file of another machine": (
        {"video": "file://host/a.mp4", "conversations": human(ASKED)},
        "video",
        "another machine",
    ),
    "a broken address": ({"video": "file://[", "conversations": human(ASKED)}, "video", "another machine"),
    "frames in place of a video": (
        user({"type": "video", "video": ["1.jpg", "2.jpg"]}, "?"),
        "video",
        "expected paths",
    ),
    "bytes in place of a path": (
        {"video": {"bytes": "x", "path": "a"}, "conversations": human(ASKED)},
        "video",
        "is the file itself",
    ),
    "two names": (
        {**user({"type": "video", "video": "a.mp4"}, "?"), "videos": ["b.mp4"]},
        "video",
        "give one of the two",
    ),
    "a part without a name": (user({"type": "video"}, "?"), "video", "1 <video> placeholders but 0 videos"),
    "no video for an image": ({"conversations": human("<image>\nWhat?")}, "conversation", "<image>: reserved"),
    "an image beside its video's place": (
        {"video": "a.mp4", "conversations": human("<video> and <image>?")},
        "conversation",
        "<image>: reserved",
    ),
    "both lists": (
        {"conversations": human("What?"), "messages": [{"role": "user", "content": "Who?"}, SAID]},
        "conversation",
        "give one of the two",
    ),
    "an unknown part": (user({"type": "tool_use", "id": 1}), "conversation", "content part"),
    "a tool's turn": (
        {"conversations": [*human("What?"), {"from": "function_call", "value": "{}"}]},
        "conversation",
        "function_call",
    ),
    "columns of two lengths": ({"conversations": {"from": ["human"], "value": []}}, "conversation", "a list under"),
    "a system's list": ({"conversations": human("What?"), "system": 5}, "conversation", "content 5"),
}


@pytest.mark.parametrize("form", BAD)
def test_what_is_not_read_is_a_bad_row(form: str) -> None:
    row, reason, words = BAD[form]
    with pytest.raises(BadRowError) as caught:
        read(row)
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("odd", [None, 5, "x", True, [], {}, [[]], [None], [5], {"a": []}, [{"type": []}], {"url": {}}])
def test_odd_values_anywhere_are_bad_rows(odd: Any) -> None:
    """Whatever stands in the place of a value: a conversation, or a ``BadRowError`` and nothing else."""
    whole: dict[str, Any] = {"video": "a.mp4", "system": "s", **user({"type": "video", "video": "a.mp4"}, "?")}
    for key in whole:
        tried(whole | {key: odd})
    for key in ("conversations", "question", "videos", "image", "id", "answer"):
        tried(whole | {key: odd})
        tried({key: odd})
    for message in ({"role": odd, "content": "a"}, {"role": "user", "content": odd}, {"from": odd, "value": odd}, odd):
        tried({"messages": [message, SAID], "video": "a.mp4"})
    for part in (
        {"type": odd},
        {"type": "video", "video": odd},
        {"type": "text", "text": odd},
        {"type": "audio", "url": odd},
        odd,
    ):
        tried(user(part) | {"video": "a.mp4"})


def tried(row: Any) -> None:
    with contextlib.suppress(BadRowError):
        read(row)
