"""Reading held-out clips back from shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from hybridprune_megatron.evaluation.held_out import read_clips


def _shard(path: Path, samples: dict[str, dict]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, content in samples.items():
            for part, data in (("json", json.dumps(content).encode()), ("mp4", f"video of {key}".encode())):
                entry = tarfile.TarInfo(f"{key}.{part}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def _content(answer: str) -> dict:
    messages = [
        {"role": "user", "content": "<video>\nWhat colour is the needle?"},
        {"role": "assistant", "content": answer},
    ]
    return {"conversation": messages, "meta": {"kind": "colour", "answer": answer, "choices": ["red", "blue"]}}


def test_clips_come_in_the_order_of_the_shards(tmp_path):
    _shard(tmp_path / "shard-00001.tar", {"b": _content("blue")})
    _shard(tmp_path / "shard-00000.tar", {"z": _content("red"), "a": _content("blue")})
    clips = list(read_clips(tmp_path))
    assert [clip.key for clip in clips] == ["z", "a", "b"]
    assert clips[0].video == b"video of z"
    assert clips[0].question == "What colour is the needle?"
    assert [clip.answer for clip in clips] == ["red", "blue", "blue"]
    assert clips[0].choices == ("red", "blue")


def test_shards_without_answers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no shards there; scripts/make_demo_data.py"):
        list(read_clips(tmp_path))
    content = _content("red")
    del content["meta"]["choices"]
    _shard(tmp_path / "shard-00000.tar", {"a": content})
    with pytest.raises(ValueError, match="sample a has no 'choices'"):
        list(read_clips(tmp_path))
