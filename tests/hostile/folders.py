"""Data sets that somebody else could have made, and a configuration that reads them."""

from __future__ import annotations

import copy
import io
import struct
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hybridprune_megatron.config import Config
from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.data.shards import ShardWriter

TOKENIZER = Path(__file__).resolve().parents[2] / "assets/demo/tokenizer"


def turns(question: Any = "Where?", answer: Any = "end", system: Any = None) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def write_set(folder: Path, keys: Iterable[str], split: str = "train", samples_per_shard: int = 500) -> Path:
    """A good data set of text."""
    with ShardWriter(folder, split, samples_per_shard) as writer:
        for key in keys:
            writer.add(key, turns(), [])
    return folder


def config(train: Path, *overrides: str) -> Config:
    """The demo's configuration over a training set, nothing of which is looked at yet."""
    cfg = copy.deepcopy(_config(overrides))
    cfg.data.train = str(train)
    return cfg


@cache
def _config(overrides: tuple[str, ...]) -> Config:
    # Composing takes a second.
    tiny = ["data.sequence_length=320", "data.packing_buffer=4", "data.shuffle_buffer=4", "trainer.global_batch_size=1"]
    paths = ["data.train=none", "data.validation=null", f"data.tokenizer={TOKENIZER}"]
    return load_config(["experiment=demo_base", "name=hostile", *tiny, *paths, *overrides])


def member(name: str, content: bytes = b"", form: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    """A member of a tar file of one of the forms that ``tarfile`` knows, with any fields of its header."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry.tobuf(form) + content + bytes(-len(content) % 512)


def write_shard(path: Path, samples: list[bytes], offsets: list[int] | None = None) -> None:
    """A shard and its index, of the members of every sample; ``offsets`` are written instead of the true ones."""
    ends = [0]
    for sample in samples:
        ends.append(ends[-1] + len(sample))
    path.write_bytes(b"".join(samples) + bytes(1024))
    index = ends if offsets is None else offsets
    path.with_suffix(".tar.idx").write_bytes(b"".join(struct.pack("<Q", offset) for offset in index))


def json_member(key: str, text: bytes | str) -> bytes:
    """The conversation of a sample."""
    return member(f"{key}.json", text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


def tar_names(folder: Path) -> list[str]:
    """Names of the members of all shards."""
    names: list[str] = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as tar:
            names += tar.getnames()
    return names
