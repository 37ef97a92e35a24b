"""Rows that lie in tables, and rows that several threads prepare."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridprune_megatron.commands.shards import main as shards
from hybridprune_megatron.data.in_order import in_order
from hybridprune_megatron.data.row_files import rows_at
from hybridprune_megatron.data.rows import BadRowError
from tests.data.conftest import encode_clip, grey_frames
from tests.data.test_shards import read_tars

TURNS = [{"role": "user", "content": "<video>\nWhich grey?"}, {"role": "assistant", "content": "Dark."}]


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "video": "grey.mp4", "messages": TURNS, **more}


def arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "w") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def ids(path: Path, split: str | None = None) -> list[Any]:
    """Ids of the rows that can be read, and the reasons of the others."""
    rows, found = rows_at(path, split), []
    for number, read in rows.each:
        assert number == len(found) + 1
        try:
            found.append(read().id)
        except BadRowError as error:
            found.append(error.reason)
    assert len(found) == rows.count
    return found


def saved(folder: Path, files: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list([row(number) for number in range(5)])
    train.save_to_disk(tmp_path / "one", num_shards=2)
    assert ids(tmp_path / "one") == [f"r{number}" for number in range(5)]
    # A selection is not saved as the whole.
    train.select([4, 1]).save_to_disk(tmp_path / "some")
    assert ids(tmp_path / "some") == ["r4", "r1"]
    both = datasets.DatasetDict(train=train, test=train.select([2]))
    both.save_to_disk(tmp_path / "both")
    assert ids(tmp_path / "both", "test") == ["r2"]
    with pytest.raises(ValueError, match=r"choose one of its splits: 'train', 'test' \(--source-split\)"):
        rows_at(tmp_path / "both")
    with pytest.raises(ValueError, match="has no split dev: 'train', 'test'"):
        rows_at(tmp_path / "both", "dev")


def test_parquet_files_are_read_in_order_and_split_by_name(tmp_path: Path) -> None:
    for part in range(2):
        parquet(tmp_path / "data" / f"train-{part:05d}-of-00002.parquet", [row(2 * part), row(2 * part + 1)])
    assert ids(tmp_path) == ids(tmp_path / "data") == ids(tmp_path, "train") == ["r0", "r1", "r2", "r3"]
    assert ids(tmp_path / "data" / "train-00001-of-00002.parquet") == ["r2", "r3"]
    parquet(tmp_path / "data" / "test-00000-of-00001-0123456789abcdef.parquet", [row(9)])
    assert ids(tmp_path, "test") == ["r9"]
    # What is held out never slips into the rest.
    with pytest.raises(ValueError, match="choose one of its splits: 'test', 'train'"):
        rows_at(tmp_path)
    for part in range(3):
        parquet(tmp_path / "numbered" / f"{part:04d}.parquet", [row(part)])
    assert ids(tmp_path / "numbered") == ["r0", "r1", "r2"]


def test_only_what_a_row_says_is_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "messages": [TURNS] * 3,
            "video": [{"bytes": None, "path": "grey.mp4"}] * 3,
            "id": pa.array([1.5, float("nan"), None]),
            "when": pa.array([0, 1, 2], pa.timestamp("s")),
            "kind": ["shade", None, "shade"],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = [read() for _, read in rows_at(tmp_path / "rows.parquet").each]
    # A number that JSON does not know would make the sample unreadable.
    assert [each.id for each in rows] == [1.5, "nan", None]
    assert [each.videos for each in rows] == [["grey.mp4"]] * 3
    assert rows[0].known == {"kind": "shade"}
    pq.write_table(pa.table({"when": [1, 2]}), tmp_path / "none.parquet")
    assert ids(tmp_path / "none.parquet") == ["conversation"] * 2


def test_media_in_a_table_are_bad_rows(tmp_path: Path) -> None:
    sounds = [None, {"bytes": b"wav", "path": None}, {"bytes": None, "path": None}]
    parquet(tmp_path / "rows.parquet", [row(number, audio=sound) for number, sound in enumerate(sounds)])
    assert ids(tmp_path / "rows.parquet") == ["r0", "media", "r2"]
    parquet(tmp_path / "image.parquet", [row(0, image={"bytes": b"png", "path": None})])
    assert ids(tmp_path / "image.parquet") == ["video"]
    parquet(tmp_path / "video.parquet", [row(0, video={"bytes": b"mp4", "path": "grey.mp4"})])
    assert ids(tmp_path / "video.parquet") == ["video"]


def test_a_broken_table_costs_what_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    saved(folder, ["a.arrow", "b.arrow", "c.arrow", "none.arrow"])
    arrow(folder / "a.arrow", [row(0), row(1)])
    arrow(folder / "c.arrow", [row(2)])
    whole = (folder / "a.arrow").read_bytes()
    (folder / "b.arrow").write_bytes(whole[: len(whole) // 2])
    assert ids(folder) == ["r0", "r1", "table", "r2", "table"]
    # Text that is none, in one row of a batch.
    bad = (folder / "a.arrow").read_bytes().replace(b"r1", b"\xff1")
    (folder / "a.arrow").write_bytes(bad)
    assert ids(folder)[:2] == ["r0", "table"]
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and more")
    assert ids(tmp_path / "x.parquet") == ["table"]
    arrow(tmp_path / "long.arrow", [row(0, question=None), row(1, question="x" * 2**24)])
    assert ids(tmp_path / "long.arrow") == ["r0", "table"]


def test_every_byte_of_a_table_may_be_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    arrow(path, [row(0), row(1)])
    whole = path.read_bytes()
    outcomes = Counter[str]()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        for _, read in rows_at(path).each:
            try:
                read()
                outcomes["read"] += 1
            except BadRowError as error:
                outcomes[error.reason] += 1
    # Nothing else is raised, some bytes break the table, and some say nothing.
    assert outcomes["read"] > 0
    assert outcomes["table"] > 0


@pytest.mark.parametrize("name", ["../rows.arrow", "/etc/passwd", "link.arrow", "a/b.arrow", 5, "", None])
def test_files_outside_of_the_folder_are_not_opened(tmp_path: Path, name: Any) -> None:
    arrow(tmp_path / "rows.arrow", [row(0)])
    saved(tmp_path / "set", [name])
    (tmp_path / "set" / "link.arrow").symlink_to(tmp_path / "rows.arrow")
    with pytest.raises(ValueError, match=r"only names of files|outside of the folder|expected names"):
        rows_at(tmp_path / "set")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["../set"]}))
    with pytest.raises(ValueError, match="only names of files"):
        rows_at(tmp_path / "dict")
    (tmp_path / "set" / "state.json").unlink()
    parquet(tmp_path / "rows.parquet", [row(0)])
    (tmp_path / "set" / "link.parquet").symlink_to(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="outside of the folder"):
        rows_at(tmp_path / "set")


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 5}', '{"_data_files": []}', '{"_data_files": [5]}'])
def test_a_broken_description_is_one_line(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"state\.json") as caught:
        rows_at(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder without state"):
        rows_at(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"--source-split train: .* is a file"):
        rows_at(tmp_path / "rows.jsonl", "train")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": ["a"], "_indices_files": ["b"]}))
    with pytest.raises(ValueError, match="a selection of rows"):
        rows_at(tmp_path)
    # A pipe is not waited for.
    saved(tmp_path, ["pipe.arrow"])
    os.mkfifo(tmp_path / "pipe.arrow")
    assert ids(tmp_path) == ["table"]


# ---- threads --------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items() -> None:
    read: list[int] = []

    def items() -> Any:
        for number in range(20):
            read.append(number)
            yield number

    def slow(number: int) -> tuple[int, int]:
        time.sleep(0.002 * (number % 3 == 0))
        return number, threading.get_ident()

    results = in_order(slow, items(), 3)
    assert next(results)[0] == 0
    # Not far ahead: what waits holds whole videos.
    assert len(read) <= 6
    rest = list(results)
    assert [number for number, _ in rest] == list(range(1, 20))
    assert threading.get_ident() not in {thread for _, thread in rest}


def test_the_first_error_in_order_is_raised_and_the_rest_given_up() -> None:
    done: list[int] = []

    def fail(number: int) -> int:
        time.sleep(0.01 * (number == 1))
        if number in (1, 2):
            raise ValueError(str(number))
        done.append(number)
        return number

    with pytest.raises(ValueError, match="1"):
        list(in_order(fail, range(100), 2))
    assert len(done) < 10


def test_several_workers_write_what_one_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grey.mp4").write_bytes(encode_clip(grey_frames(5), range(0, 200, 40)))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "grey.mp4").read_bytes()[:-300])
    names = ["grey.mp4", "grey.mp4", "cut.mp4", "grey.mp4", "none.mp4"]
    rows = [row(number % 7, video=names[number % 5], audio=None) for number in range(20)]
    rows[3]["audio"] = "a.wav"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet(tmp_path / "rows.parquet", rows)
    sets = {}
    for name, source, workers in (("one", "rows.json", 1), ("three", "rows.json", 3), ("table", "rows.parquet", 2)):
        out = tmp_path / name
        shards(
            f"--conversations {tmp_path / source} --videos {tmp_path} --out {out} --samples-per-shard 4 "
            f"--workers {workers}".split()
        )
        sets[name] = (read_tars(out), json.loads((out / "report.json").read_text()))
        progress = capsys.readouterr().err
        assert "20/20" in progress
        assert "sample" in progress
    assert sets["one"] == sets["three"] == sets["table"]
    left_out = sets["one"][1]["left_out"]
    assert left_out["media"] == 1
    assert left_out["video"] > 1
    with pytest.raises(SystemExit, match="2"):
        shards(f"--conversations {tmp_path}/rows.json --videos {tmp_path} --out {tmp_path}/no --workers 0".split())
    assert "--workers 0: at least 1" in capsys.readouterr().err
