"""Data sets on disk: scripts, what they leave out, and that a broken run leaves nothing behind."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.config.outputs import MARKER
from hybridprune_megatron.data.shards import ShardWriter
from scripts.make_demo_data import main as make_demo_data
from scripts.make_shards import main as make_shards

from .conftest import encode_clip, grey_frames

TURNS = [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "Grey."}]


def read_tars(folder: Path) -> dict[str, bytes]:
    """Every member of every shard."""
    members = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members.update({entry.name: tar.extractfile(entry).read() for entry in tar})  # type: ignore[union-attr]
    return members


def test_demo_data_is_described_and_reproducible(demo_data: Path, tmp_path: Path) -> None:
    description = json.loads((demo_data / "train" / "needles.json").read_text())
    assert description["samples"] == 13
    assert description["chance"] == {"colour": 1 / 8, "shape": 1 / 5, "digit": 1 / 10, "place": 1 / 4, "moment": 1 / 4}
    assert sum(sum(counts.values()) for counts in description["answers"].values()) == 13
    # Two threads write what one wrote.
    make_demo_data(f"--out {tmp_path} --train 13 --validation 0 --frames 8 --fps 1 --workers 2 --seed 3".split())
    assert read_tars(tmp_path / "train") == read_tars(demo_data / "train")
    assert not (tmp_path / "validation").exists()


def test_demo_data_is_left_alone_when_it_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"--out {tmp_path} --train 3 --validation 0 --frames 4 --fps 1 --workers 1"
    make_demo_data(command.split())
    before = (tmp_path / "train" / "shard-00000.tar").stat().st_mtime_ns
    make_demo_data(command.split())
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "train" / "shard-00000.tar").stat().st_mtime_ns == before
    make_demo_data([*command.split(), "--seed", "9"])
    assert json.loads((tmp_path / "train" / "needles.json").read_text())["seed"] == 9
    (tmp_path / "train" / "needles.json").unlink()
    (tmp_path / "train" / MARKER).unlink()
    with pytest.raises(SystemExit, match="2"):
        make_demo_data(command.split())
    assert "was not written by" in capsys.readouterr().err


def test_demo_data_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_demo_data(["--out", str(tmp_path), "--needles", "9"])
    assert capsys.readouterr().err.startswith("hybridprune make_demo_data: --needles 9")


def write(folder: Path, *samples: tuple[str, list[tuple[str, bytes]]]) -> None:
    with ShardWriter(folder, "train") as writer:
        for key, videos in samples:
            writer.add(key, TURNS, videos)


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each key once"):
        write(tmp_path / "set", ("a", [("mp4", b"x")]), ("a.b", []))
    with pytest.raises(ValueError, match="no sample for"):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_writer_takes_no_folder_of_anybody_elses(tmp_path: Path) -> None:
    theirs = tmp_path / ".set.partial"
    theirs.mkdir()
    (theirs / "shard-00007.tar").write_bytes(b"half")
    with ShardWriter(tmp_path / "set", "train", samples_per_shard=2) as writer:
        for key in "abc":
            writer.add(key, TURNS, [("mp4", key.encode())])
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == ["shard-00000.tar", "shard-00001.tar"]
    assert list(read_tars(tmp_path / "set")) == ["a.json", "a.mp4", "b.json", "b.mp4", "c.json", "c.mp4"]
    assert [path.name for path in theirs.iterdir()] == ["shard-00007.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial", "set"]


def test_writer_checks_keys_types_and_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each key once"):
        write(tmp_path / "set", ("a", []), ("a", []))
    with pytest.raises(ValueError, match="video of type 'pkl'"):
        write(tmp_path / "set", ("a", [("pkl", b"")]))
    with pytest.raises(ValueError, match="exists"):
        ShardWriter(tmp_path, "train")


def row(**changes: Any) -> str:
    return json.dumps({"id": "r", "video": "grey.mp4", "conversations": TURNS, **changes})


def test_make_shards_keeps_good_rows_and_counts_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    clip = encode_clip(grey_frames(5), range(0, 200, 40))
    (videos / "grey.mp4").write_bytes(clip)
    (videos / "broken.mp4").write_bytes(b"broken")
    (videos / "notes.txt").write_text("text")
    (tmp_path / "outside.mp4").write_bytes(clip)
    other_style = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "Grey."}]
    two = [{"role": "user", "content": "<video> and <video>?"}, TURNS[1]]
    rows = [
        row(id="a/1"),
        row(id="b", conversations=other_style),
        row(id="c", video=None, videos=["grey.mp4", "grey.mp4"], conversations=two),
        json.dumps({"conversations": [{"role": "user", "content": "Hi"}, TURNS[1]]}),
        "",
        "{not json",
        row(id="d", conversations="Hi"),
        row(id="e", conversations=TURNS[:1]),
        row(id="f", video="broken.mp4"),
        row(id="g", video="none.mp4"),
        row(id="h", video="notes.txt"),
        row(id="i", video="../outside.mp4"),
        row(id="j", videos=["grey.mp4", "grey.mp4"]),
        row(id="a_1"),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arguments = f"--conversations {tmp_path}/rows.jsonl --videos {videos} --out {tmp_path}/set".split()
    make_shards(arguments)
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["samples"] == 5
    assert report["left_out"] == {"json": 1, "conversation": 2, "video": 5}
    assert "5 samples, 8 rows left out (2 conversation, 1 json, 5 video)" in capsys.readouterr().out
    members = read_tars(tmp_path / "set")
    assert list(members) == [
        *("a_1.json", "a_1.mp4", "b.json", "b.mp4", "c.json", "c.0.mp4", "c.1.mp4"),
        *("row-00000004.json", "a_1-00000014.json", "a_1-00000014.mp4"),
    ]
    assert members["b.mp4"] == clip
    assert json.loads(members["b.json"])["conversation"][0] == {"role": "user", "content": "<video>What?"}
    with pytest.raises(SystemExit, match="2"):
        make_shards(arguments)
    assert re.search(r"^hybridprune shards: .* exists", capsys.readouterr().err, re.MULTILINE)
