"""Where rows lie: a JSONL file, a JSON array, or a table (a parquet or Arrow file, a folder that ``datasets`` wrote).

Tables are read by pyarrow alone, column by column: no code of a data set is run, and no file outside of the named
folder is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.json_text import read_json, short
from hybridprune_megatron.data.row_forms import is_row_key
from hybridprune_megatron.data.rows import MOST_ROW_BYTES, BadRowError, Row, open_rows, plain_row, raw_rows, read_row

TABLE_SUFFIXES = (".parquet", ".arrow")
#: What follows the name of a split in the name of a file: train-00000-of-00002.parquet, train_0.parquet, 0000.parquet.
_PART = re.compile(r"(?:[-_.]?\d+)?(?:-of-\d+)?(?:-[0-9a-f]{8,})?$")
_BATCH = 64


@dataclass(frozen=True)
class Rows:
    """The rows of a file or folder.

    Attributes:
        count: how many there are, malformed ones too.
        each: number of the row (of its line, or from 1), and what says what it means or raises ``BadRowError``; any
            thread may call it.
    """

    count: int
    each: Iterable[tuple[int, Callable[[], Row]]]


def rows_at(path: Path, split: str | None = None) -> Rows:
    """The rows of a file, or of a folder of tables.

    Args:
        path: JSONL, a JSON array, .parquet, .arrow, or a folder as ``save_to_disk`` writes it or of parquet files.
        split: which split of a folder; None for one that has no others.

    Raises:
        ValueError: a folder is neither, or has no such split; pyarrow is not installed.
        OSError: the file cannot be read.
    """
    if path.is_dir() or (path.suffix in TABLE_SUFFIXES and path.is_file()):
        return _table_rows(_tables(path, split))
    if split is not None:
        raise ValueError(f"--source-split {split}: {path} is a file, which has no splits; leave it out")
    data = open_rows(path)
    each = ((number, partial(read_row, text)) for number, _, text in raw_rows(data))
    return Rows(sum(1 for _ in raw_rows(data)), each)


def _tables(path: Path, split: str | None) -> list[Path]:
    """The files of a table, in order."""
    if not path.is_dir():
        if split is not None:
            raise ValueError(f"--source-split {split}: {path} is a file, which has no splits; leave it out")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = _names(path / "dataset_dict.json", "splits")
        return _saved(file_inside(path, _chosen(path, splits, split)))
    if (path / "state.json").is_file():
        _chosen(path, [""], split)
        return _saved(path)
    files = _parquet_files(path) or _parquet_files(path / "data")
    if not files:
        raise ValueError(
            f"{path} is a folder without state.json, dataset_dict.json and .parquet files: give a file of rows, or a "
            "folder that datasets saved"
        )
    chosen = _chosen(path, sorted({_split_of(file) for file in files}), split)
    return [file for file in files if _split_of(file) == chosen]


def _chosen(path: Path, splits: Sequence[str], split: str | None) -> str:
    """The one of the splits that is asked for, or the only one."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split is not None and split in splits:
        return split
    named = ", ".join(map(short, filter(None, splits))) or "none"
    asked = "choose one of its splits" if split is None else f"has no split {split}"
    raise ValueError(f"{path} {asked}: {named} (--source-split)")


def _saved(folder: Path) -> list[Path]:
    """The files of a folder that ``Dataset.save_to_disk`` wrote."""
    state = folder / "state.json"
    content = read_json(state)
    if isinstance(content, dict) and content.get("_indices_files"):
        raise ValueError(f"{folder} is a selection of rows, as old versions of datasets saved it: save it again")
    return [file_inside(folder, name) for name in _names(state, "_data_files")]


def _names(file: Path, key: str) -> list[str]:
    """Names of files or folders that a JSON file lists, as such or under ``filename``."""
    content = read_json(file)
    listed = content.get(key) if isinstance(content, dict) else None
    entries = listed if isinstance(listed, list) else []
    named = [each.get("filename") if isinstance(each, dict) else each for each in entries]
    names = [name for name in named if isinstance(name, str)]
    if not names or len(names) < len(named):
        raise ValueError(f"{file}: {key} is {short(listed)}, expected names; save the data set again")
    return names


def _parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = sorted(each.name for each in folder.iterdir() if each.suffix == ".parquet" and each.name[0] != ".")
    return [file_inside(folder, name) for name in names]


def _split_of(file: Path) -> str:
    return _PART.sub("", file.stem)


def _table_rows(files: Sequence[Path]) -> Rows:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(f"{files[0]} is a table, which pyarrow reads: pip install pyarrow") from None
    counts = [_count(file) for file in files]
    return Rows(sum(counts), enumerate((each for file in files for each in _read_file(file)), 1))


def _count(file: Path) -> int:
    """The rows of a file, and one for the rest where that cannot be read."""
    import pyarrow

    count = 0
    try:
        if file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as parquet:
                return int(parquet.metadata.num_rows)
        for batch in _batches(file):
            count += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError):
        count += 1
    return count


def _read_file(file: Path) -> Iterator[Callable[[], Row]]:
    """What reads each row of a file; where the rest cannot be read, one row says so."""
    import pyarrow

    try:
        for batch in _batches(file):
            batch.validate()
            for index in range(batch.num_rows):
                yield partial(_row, batch.slice(index, 1))
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = f"{file.name}: its rest cannot be read ({' '.join(str(error).split()):.200})"
        yield partial(_fail, reason)


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of the columns that mean something in a row."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    # A pipe has no end, and a device neither.
    if not file.is_file():
        raise OSError("no file")
    if file.suffix == ".parquet":
        with ParquetFile(file) as parquet:
            columns = [name for name in parquet.schema_arrow.names if is_row_key(name)]
            yield from parquet.iter_batches(batch_size=_BATCH, columns=columns)
        return
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
        columns = sorted({name for name in stream.schema.names if is_row_key(name)})
        for batch in stream:
            yield batch.select(columns)


def _row(batch: Any) -> Row:
    """What a batch of one row means."""
    import pyarrow

    try:
        # Offsets and texts are checked before they are followed: the file comes from somewhere else.
        batch.validate(full=True)
        if batch.nbytes > MOST_ROW_BYTES:
            raise BadRowError("table", f"{batch.nbytes} bytes, above {MOST_ROW_BYTES}")
        [row] = batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, BadRowError):
            raise
        raise BadRowError("table", f"cannot be read ({' '.join(str(error).split()):.200})") from error
    return plain_row(row)


def _fail(reason: str) -> Row:
    raise BadRowError("table", reason)
