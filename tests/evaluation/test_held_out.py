"""Reading held-out clips back from shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from hybridprune_megatron.data.stored_samples import read_samples
from hybridprune_megatron.evaluation.held_out import read_clips


def _shard(path: Path, samples: dict[str, dict], videos: tuple[str, ...] = ("mp4",)) -> None:
    with tarfile.open(path, "w") as tar:
        for key, content in samples.items():
            parts = [("json", json.dumps(content).encode())]
            parts += [(part, f"{part.removesuffix('mp4')}video of {key}".encode()) for part in videos]
            for part, data in parts:
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


def test_samples_keep_their_videos_in_order_and_need_no_answer(tmp_path):
    videos = ("10.mp4", "2.mp4", "0.mp4", "note.txt")
    _shard(tmp_path / "shard-00000.tar", {"a": {"conversation": _content("red")["conversation"]}}, videos)
    (sample,) = read_samples(tmp_path)
    assert sample.videos == (b"0.video of a", b"2.video of a", b"10.video of a")
    assert sample.meta == {}
    assert sample.messages[1]["content"] == "red"
    with pytest.raises(ValueError, match="sample a has 3 videos; an evaluation needs one video"):
        list(read_clips(tmp_path))
