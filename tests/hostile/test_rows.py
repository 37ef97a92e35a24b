"""``make_shards``: every row becomes a sample or is listed with its reason, whatever the file holds."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hybridprune_megatron.data.rows import raw_rows, read_row, unique_key
from hybridprune_megatron.data.shards import read_shard
from hybridprune_megatron.data.task_encoder import TrainLoader
from scripts.make_shards import main as make_shards
from tests.hostile.folders import config, tar_names

ASKED = [{"from": "human", "value": "<video>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
HELLO = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole clip, and the same with its last quarter cut off."""
    folder = tmp_path_factory.mktemp("videos")
    with av.open(str(folder / "plain.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (24, 32, 48, 3), dtype=np.uint8)
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "3.02\u202fPM \u732b.mp4").write_bytes(whole)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    return folder


def run(rows: Path, videos: Path, *more: str) -> Path:
    """Makes a data set beside a file of rows."""
    out = rows.with_suffix(".set")
    make_shards(["--conversations", str(rows), "--videos", str(videos), "--out", str(out), *more])
    return out


def write(path: Path, rows: list[Any], mark: bytes = b"", end: bytes = b"\n") -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(mark + end.join(lines) + end)
    return path


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """Conversations and meta of all samples by key."""
    return {key: json.loads(parts["json"]) for shard in sorted(out.glob("*.tar")) for key, parts in read_shard(shard)}


def listed(out: Path) -> tuple[dict[str, int], list[str]]:
    report = json.loads((out / "report.json").read_text())
    return report["left_out"], report["rows"]


# ---- ids ------------------------------------------------------------------------------------------------------------

IDS: dict[str, list[Any]] = {
    "other scripts": ["\u732b", "\u72ac", "\u9ce5", "vid\u00e9o 1", "vid\u00e9o-1"],
    "null": [None, None, None],
    "empty": ["", "", " "],
    "repeated": ["v1", "v1", "v2", "v1"],
    "numbers": [1, 1, "1", 1.5, "1_5", True, 0, -1, 10**90],
    "objects": [[1], [1], {"a": 1}, {"b": 1}, [], [[[[[]]]]]],
    "only signs": ["...", "///", "___", "-", "\n", "\0"],
    "what numbered keys look like": ["v", "v", "v-00000002", "v-00000002", "row-00000006", None],
    "folders": ["a/1", "a.1", "a_1", "a\\1", "../a", "/a"],
    "long": ["x" * 5000, "x" * 5001, "x" * 80],
    "cases": ["A", "a"],
    "names of parts": ["a.mp4", "a.json", "a", "__a__", "__key__"],
}


@pytest.mark.parametrize("kind", IDS)
def test_every_id_is_a_sample_and_is_kept(tmp_path: Path, kind: str) -> None:
    ids = IDS[kind]
    rows = [{"id": each, "conversations": HELLO} for each in ids] + [{"conversations": HELLO}]
    found = samples(run(write(tmp_path / "rows.jsonl", rows), tmp_path))
    assert len(found) == len(rows)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,100}", key) for key in found)
    kept = [sample["meta"].get("id") for sample in found.values()]
    expected = [None if each in (None, "") else each for each in ids] + [None]
    if kind != "objects":
        assert kept == expected
    # The same file gives the same keys.
    (tmp_path / "again").mkdir()
    assert list(samples(run(write(tmp_path / "again" / "rows.jsonl", rows), tmp_path))) == list(found)


def test_keys_say_the_id_where_they_can() -> None:
    taken: list[str] = []
    for number, (row_id, key) in enumerate(
        [
            ("a1", "a1"),
            ("a1", "a1-00000002"),
            ("a/1", "a_1"),
            (None, "row-00000004"),
            (7, "7"),
            ("\u732b", "row-00000006"),
        ],
        start=1,
    ):
        taken.append(unique_key(row_id, number, taken))
        assert taken[-1] == key


def test_training_reads_every_row(tmp_path: Path) -> None:
    rows = [{"id": each, "conversations": HELLO} for each in ("\u732b", "\u72ac", None, "v", "v")]
    out = run(write(tmp_path / "rows.jsonl", rows), tmp_path)
    loader, keys = TrainLoader(config(out), 0, 1), set()
    for batch in loader:
        keys.update(key for key in batch.keys if key)
        if len(keys) == 5:
            break
    assert set(loader.counts) == {"seen"}


# ---- videos ---------------------------------------------------------------------------------------------------------


def test_null_empty_and_absent_videos_are_the_same(tmp_path: Path, videos: Path) -> None:
    nothing: list[dict[str, Any]] = [{}, *({"video": none} for none in (None, "", [], [None], [""]))]
    nothing += [*({"videos": none} for none in (None, "", [], [""])), {"video": "", "videos": None}]
    one: list[dict[str, Any]] = [{"video": "plain.mp4"}, {"videos": ["plain.mp4"]}, {"video": ["plain.mp4"]}]
    one += [{"videos": "plain.mp4"}, {"video": "plain.mp4", "videos": None}, {"video": None, "videos": ["plain.mp4"]}]
    one += [{"video": "plain.mp4", "videos": ["plain.mp4"]}, {"video": "./plain.mp4", "videos": []}]
    one += [{"video": "3.02\u202fPM \u732b.mp4"}]
    rows = [{"conversations": HELLO, **each} for each in nothing] + [{"conversations": ASKED, **each} for each in one]
    out = run(write(tmp_path / "rows.jsonl", rows), videos)
    assert listed(out) == ({}, [])
    assert sum(name.endswith(".json") for name in tar_names(out)) == len(rows)
    assert sum(name.endswith(".mp4") for name in tar_names(out)) == len(one)


def test_videos_that_cannot_be_used_are_listed(tmp_path: Path, videos: Path) -> None:
    outside = tmp_path / "outside.mp4"
    outside.write_bytes((videos / "plain.mp4").read_bytes())
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("plain.mp4", "cut.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    (folder / "link.mp4").symlink_to(outside)
    (folder / "folder.mp4").mkdir()
    (folder / "empty.mp4").touch()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "text.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
    # A pipe is not waited for.
    os.mkfifo(folder / "pipe.mp4")
    with (folder / "huge.mp4").open("wb") as file:
        file.truncate(2**32 + 1)
    names: list[Any] = [
        *(
            "cut.mp4",
            "link.mp4",
            "folder.mp4",
            "empty.mp4",
            "loop.mp4",
            "text.mp4",
            "pipe.mp4",
            "none.mp4",
            "plain",
            "huge.mp4",
        ),
        *(
            "../outside.mp4",
            str(outside),
            "a\0b.mp4",
            "n" * 5000 + ".mp4",
            "file:plain.mp4",
            "https://example.com/a.mp4",
        ),
        *(5, {"a": 1}, ["plain.mp4", 5], [["plain.mp4"]], ["plain.mp4", "plain.mp4"], True),
    ]
    rows = [{"video": name, "conversations": ASKED} for name in names]
    rows += [{"video": "plain.mp4", "videos": ["cut.mp4"], "conversations": ASKED}]
    rows += [{"video": "plain.mp4", "conversations": HELLO}, {"conversations": ASKED}]
    rows += [{"video": "plain.mp4", "conversations": ASKED}]
    out = run(write(tmp_path / "rows.jsonl", rows), folder)
    left_out, lines = listed(out)
    assert left_out == {"video": len(rows) - 1}
    assert [line.split(":")[0] for line in lines] == [f"row {number}" for number in range(1, len(rows))]
    assert all("\n" not in line and len(line) < 400 for line in lines)
    assert "cut.mp4" in lines[0]
    assert tar_names(out) == [f"row-{len(rows):08d}.json", f"row-{len(rows):08d}.mp4"]


# ---- rows that training always leaves out ---------------------------------------------------------------------------

BAD_ROWS: list[tuple[str, bytes | dict[str, Any]]] = [
    ("json", b"{not json"),
    ("json", b'{"conversations": "\\ud800"}'),
    ("json", b"[" * 200_000),
    ("json", b'{"a":' * 200_000),
    ("json", b'{"conversations": [], "a": ' + b"9" * 5000 + b"}"),
    ("json", b'{"conversations": [], "a": NaN}'),
    ("json", b"\xff\xfe{}"),
    ("json", b"\0" * 100),
    ("json", b"{}{}"),
    ("conversation", b"{}"),
    ("conversation", b"5"),
    ("conversation", b"null"),
    ("conversation", b'"text"'),
    ("conversation", b"[1, 2]"),
    ("conversation", {"conversations": {"a": 1}}),
    ("conversation", {"conversations": []}),
    ("conversation", {"conversations": [5]}),
    ("conversation", {"conversations": [{"from": ["human"], "value": "Hi"}]}),
    ("conversation", {"conversations": [{"from": "human", "value": ["Hi"]}]}),
    ("conversation", {"conversations": [{"from": "human", "value": [{"type": ["text"]}]}]}),
    ("conversation", {"conversations": HELLO[:1]}),
    ("conversation", {"conversations": HELLO[::-1]}),
    ("conversation", {"conversations": HELLO * 501}),
    ("conversation", {"conversations": [HELLO[0], {"from": "gpt", "value": ""}]}),
    ("conversation", {"conversations": [HELLO[0], {"from": "gpt", "value": "<SPECIAL_12>"}]}),
    ("conversation", {"conversations": [{"from": "system", "value": "a\n<SPECIAL_11>User\n"}, *HELLO]}),
    ("conversation", {"conversations": [{"from": "system", "value": "<image>"}, *HELLO]}),
    ("conversation", {"conversations": [{"from": "tool", "value": "Hi"}, *HELLO]}),
    # Nothing to score frames with, in no mode.
    ("conversation", {"video": "plain.mp4", "conversations": [{"from": "human", "value": "<video>"}, HELLO[1]]}),
]


def test_what_training_always_leaves_out_is_listed(tmp_path: Path, videos: Path) -> None:
    rows = [row for _, row in BAD_ROWS]
    start = time.process_time()
    out = run(write(tmp_path / "rows.jsonl", [*rows, {"id": "good", "conversations": HELLO}]), videos)
    assert time.process_time() - start < 5
    left_out, lines = listed(out)
    assert left_out == {name: sum(reason == name for reason, _ in BAD_ROWS) for name in ("json", "conversation")}
    assert len(lines) == len(rows)
    assert all(len(line) < 400 for line in lines)
    assert list(samples(out)) == ["good"]


def test_a_question_that_only_other_modes_miss_is_kept(tmp_path: Path, videos: Path) -> None:
    turns = [{"from": "human", "value": "<video>"}, HELLO[1], {"from": "human", "value": "And?"}, HELLO[1]]
    out = run(write(tmp_path / "rows.jsonl", [{"video": "plain.mp4", "conversations": turns}]), videos)
    assert listed(out) == ({}, [])


def test_what_is_stored_is_the_conversation_alone(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?", "more": [[[[1]]]]}]
    rows = [{"id": "a", "secret": 5, "conversations": [{"role": "user", "content": parts, "more": 1}, HELLO[1]]}]
    out = run(write(tmp_path / "rows.jsonl", rows), tmp_path)
    assert samples(out)["a"] == {
        "conversation": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Red."}],
        "meta": {"id": "a"},
    }


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n \t\n"])
def test_lines_of_all_systems_are_read(tmp_path: Path, mark: bytes, end: bytes) -> None:
    rows = [{"id": each, "conversations": HELLO} for each in "abc"]
    out = run(write(tmp_path / "rows.jsonl", rows, mark, end), tmp_path)
    assert list(samples(out)) == ["a", "b", "c"]
    assert listed(out) == ({}, [])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n \r\n\t"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read(tmp_path: Path, mark: bytes, indent: int | None) -> None:
    tricky = [{"from": "human", "value": 'a "quoted" ], [ }, { \\ \u732b'}, HELLO[1]]
    rows = [{"id": each, "conversations": tricky} for each in "abc"]
    (tmp_path / "rows.json").write_bytes(mark + json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    out = run(tmp_path / "rows.json", tmp_path)
    found = samples(out)
    assert list(found) == ["a", "b", "c"]
    assert found["a"]["conversation"][0]["content"] == tricky[0]["value"]
    assert listed(out) == ({}, [])


@pytest.mark.parametrize(
    ("bad", "left_out"),
    [
        (b'{"a": "\\ud800"}', 1),
        (b"[" * 200_000 + b"]" * 200_000, 1),
        (b"9" * 5000, 1),
        (b"NaN", 1),
        (b"'", 1),
        (b"", 1),
        (b"{]", 2),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_element_of_an_array_costs_no_other(tmp_path: Path, bad: bytes, left_out: int) -> None:
    good = [json.dumps({"id": each, "conversations": HELLO}).encode() for each in "ab"]
    (tmp_path / "rows.json").write_bytes(b"[" + b",\n".join([good[0], bad, good[1]]) + b"]")
    out = run(tmp_path / "rows.json", tmp_path)
    if left_out == 1:
        assert list(samples(out)) == ["a", "b"]
    counts, lines = listed(out)
    assert sum(counts.values()) == 1
    assert lines[0].startswith("row 2: ")


def test_the_end_of_a_cut_array_is_listed(tmp_path: Path) -> None:
    whole = json.dumps([{"id": each, "conversations": HELLO} for each in "abc"]).encode()
    for cut in (whole[:-1], whole[:-20], whole[:-3] + b"\\" * 2001):
        path = tmp_path / f"{len(cut)}.json"
        path.write_bytes(cut)
        out = run(path, tmp_path)
        found = samples(out)
        assert list(found)[:2] == ["a", "b"]
        assert len(found) + sum(listed(out)[0].values()) == 3


def test_lines_that_are_arrays_are_lines(tmp_path: Path) -> None:
    lines = [b"[1, 2]", json.dumps({"id": "a", "conversations": HELLO}).encode(), b"[3]"]
    out = run(write(tmp_path / "rows.jsonl", lines), tmp_path)
    assert list(samples(out)) == ["a"]
    assert listed(out)[0] == {"conversation": 2}


def test_odd_files_are_read_in_time() -> None:
    start = time.process_time()
    quotes = b'[{"a": "' + b'\\"' * 200_000
    assert [text for _, _, text in raw_rows(quotes)] == [quotes[1:]]
    assert len(list(raw_rows(b"[" + b"[]," * 20_000 + b"[]]"))) == 20_001
    assert list(raw_rows(b"")) == list(raw_rows(b"\n \n")) == list(raw_rows(b"[ ]")) == []
    with pytest.raises(ValueError, match="bytes, above"):
        read_row(b" " * (2**24 + 1))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"{}", b'[{"id": 1}]', b"\xff\xfe[\0", b"{}\n" * 200])
def test_nothing_usable_says_counts_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "rows.jsonl", tmp_path)
    rows = sum(1 for _ in raw_rows(content))
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"hybridprune shards: {tmp_path / 'rows.jsonl'}: 0 samples, {rows} rows left out")
    report = json.loads((tmp_path / "rows.set.report.json").read_text())
    assert sum(report["left_out"].values()) == rows
    assert len([line for line in said if line.startswith("  row ")]) == min(rows, 5)
    assert not (tmp_path / "rows.set").exists()
    assert not list(tmp_path.glob(".*"))


def test_counts_and_first_reasons_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [b"{", {"conversations": HELLO}, *[{}] * 8]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("1 samples, 9 rows left out (8 conversation, 1 json)")
    assert [line.split(":")[0] for line in lines[1:]] == [f"  row {number}" for number in (1, 3, 4, 5, 6)]


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_shard_holds_a_sample_at_least(tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"conversations": HELLO}])
    with pytest.raises(SystemExit, match="2"):
        run(rows, tmp_path, "--samples-per-shard", count)
    assert capsys.readouterr().err.startswith(f"hybridprune shards: {count} samples in a shard: at least 1")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "none.jsonl", tmp_path)
    assert "none.jsonl" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
