"""Which samples of a folder or of a blend are asked, and what becomes of those that cannot be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.own_keys import data_path
from hybridprune_megatron.data.conversation import Conversation
from hybridprune_megatron.data.left_out import LeftOut
from hybridprune_megatron.data.sample_encoder import BadSampleError
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.evaluation.asked import read_questions

BLEND = """__module__: megatron.energon
__class__: MetadatasetV2
splits:
  val:
    blend:
      - {weight: 3, path: one}
      - {weight: 1, path: two}
"""


class Encoder:
    """Stands for the encoder of samples: a key that begins with "bad" cannot be used."""

    def prompt(self, key: str, conversation: Conversation, videos: tuple[bytes, ...]) -> Any:
        if key.startswith("bad"):
            raise BadSampleError("video", key, "cannot be decoded")
        return SimpleNamespace(key=key, conversation=conversation, videos=videos)

    def answer_ids(self, key: str, text: str) -> tuple[int, ...]:
        return (*text.encode(), 0)


def write(folder: Path, *keys: str, split: str = "val") -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You"}]
    with ShardWriter(folder, split, samples_per_shard=2) as writer:
        for key in keys:
            writer.add(key, messages, [], {"answer": "you"} if key == "a1" else {})


def asked(data: Path, count: int) -> tuple[list[str], LeftOut]:
    left_out = LeftOut()
    questions = list(read_questions(data, Encoder(), count, left_out))  # type: ignore[arg-type]
    return [each.about.key for each in questions], left_out


def test_the_first_usable_samples_are_asked(tmp_path: Path) -> None:
    write(tmp_path / "one", "a0", "bad1", "a1", "a2", "bad3", split="train")
    keys, left_out = asked(tmp_path / "one", 2)
    assert keys == ["a0", "a1"]
    assert left_out.left_out == {"video": 1}
    assert left_out.words("samples") == "1 samples left out (1 video)"
    assert left_out.first() == ["  sample bad1: cannot be decoded"]
    assert asked(tmp_path / "one", 9)[0] == ["a0", "a1", "a2"]
    (first, second) = read_questions(tmp_path / "one", Encoder(), 2, LeftOut())  # type: ignore[arg-type]
    assert (first.about.answer, second.about.answer) == ("You", "you")
    # What is likely is the turn of the conversation, whatever is right.
    assert first.said == second.said == (*b"You", 0)


def test_a_blend_gives_as_its_weights_say(tmp_path: Path) -> None:
    write(tmp_path / "one", *(f"a{index}" for index in range(5)))
    write(tmp_path / "two", *(f"b{index}" for index in range(5)))
    (tmp_path / "blend.yaml").write_text(BLEND)
    assert data_path(str(tmp_path / "blend.yaml"), None) == tmp_path / "blend.yaml"
    assert data_path(None, str(tmp_path / "one")) == tmp_path / "one"
    assert asked(tmp_path / "blend.yaml", 4)[0] == ["a0", "a1", "a2", "b0"]
    excluded = tmp_path / "one" / ".nv-meta" / "split.yaml"
    excluded.write_text(excluded.read_text().replace("exclude: []", "exclude: [shard-00000.tar/a1, shard-00001.tar]"))
    assert asked(tmp_path / "blend.yaml", 4)[0] == ["a0", "a4", "b0"]
    (tmp_path / "blend.yaml").write_text(BLEND.replace("path: two", "path: three"))
    with pytest.raises(ConfigError, match="three"):
        data_path(str(tmp_path / "blend.yaml"), None)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        data_path(str(tmp_path / "note.txt"), None)


def test_samples_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "one", "a0")
    with tarfile.open(tmp_path / "one" / "shard-00001.tar", "w") as tar:
        for key, content in (("b0", b"{"), ("b1", b'{"conversation": []}')):
            entry = tarfile.TarInfo(f"{key}.json")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    keys, left_out = asked(tmp_path / "one", 9)
    assert keys == ["a0"]
    assert left_out.left_out == {"malformed": 2}
