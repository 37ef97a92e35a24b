"""What a run validates on: the samples that an evaluation asks, planned once and read again."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import Config
from hybridprune_megatron.config.data_sets import read_data_sets
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.data.validation_set import ValidationSet, shares_of
from hybridprune_megatron.evaluation.held_out import load_questions

MakeConfig = Callable[..., Config]


def _texts(folder: Path, *answers: str | None) -> Path:
    """A data set of short questions without videos; None: the data set does not say what is right."""
    with ShardWriter(folder, "val", samples_per_shard=2) as writer:
        for number, answer in enumerate(answers):
            talk = [{"role": "user", "content": f"Which {number}?"}, {"role": "assistant", "content": "red"}]
            writer.add(f"text-{number}", talk, [], {"answer": answer} if answer else {})
    return folder


def test_it_is_what_an_evaluation_asks(demo_config: MakeConfig) -> None:
    cfg = demo_config("trainer.eval_samples=4")
    samples = ValidationSet(cfg)
    plan = samples.plan()
    assert [len(planned) for planned in plan] == [3, 1], "320 tokens hold three samples"
    assert all(each.answered for planned in plan for each in planned)
    wanted = {question.sample.key: question.sample for question in load_questions(cfg, 4)}
    read = [samples.read(planned) for planned in plan]
    # Again, as at the next validation.
    for planned, (first, _) in zip(plan, read):
        batch, present = samples.read(planned)
        assert batch is not None
        assert first is not None
        assert all(present)
        assert torch.equal(batch.pixel_values, first.pixel_values)
        length = 0
        for key, layout, each in zip(batch.keys, batch.layouts, planned):
            sample = wanted.pop(key)
            assert layout == sample.layout
            assert each.tokens == layout.num_tokens
            assert torch.equal(batch.labels[length : length + layout.num_tokens], sample.labels)
            length += layout.num_tokens
    assert not wanted


def test_a_sample_that_cannot_be_used_costs_itself(
    demo_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _texts(tmp_path / "texts", "red", None, "red", "red", "red")
    shard = folder / "shard-00000.tar"
    with tarfile.open(shard) as tar:
        parts = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    broken = json.dumps({"conversation": "none"}).encode()
    parts["text-0.json"] = broken.ljust(len(parts["text-0.json"]))
    with tarfile.open(shard, "w") as tar:
        for name, content in parts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (planned,) = ValidationSet(demo_config(f"data.validation={folder}", "trainer.eval_samples=3")).plan()
    assert [(Path(each.shard).name, each.number, each.answered) for each in planned] == [
        ("shard-00000.tar", 1, False),
        ("shard-00001.tar", 0, True),
        ("shard-00001.tar", 1, True),
    ]
    assert "sample number 0 of" in caplog.text


def test_a_video_that_cannot_be_decoded_is_left_out_at_every_validation(
    demo_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hybridprune_megatron.data.sample_encoder as sample_encoder

    samples = ValidationSet(demo_config("trainer.eval_samples=4"))
    decode, seen = sample_encoder.decode_video, []

    def fails_once(*args: object) -> object:
        seen.append(args)
        if len(seen) == 2:
            raise ValueError("cut off")
        return decode(*args)  # type: ignore[arg-type]  # passed on as they came

    plan = samples.plan()
    monkeypatch.setattr(sample_encoder, "decode_video", fails_once)
    batch, present = samples.read(plan[0])
    assert batch is not None
    assert present == [True, False, True]
    assert len(batch.layouts) == 2


def test_data_that_change_meanwhile_end_the_run(demo_config: MakeConfig, tmp_path: Path) -> None:
    folder = _texts(tmp_path / "texts", "red")
    samples = ValidationSet(demo_config(f"data.validation={folder}", "trainer.eval_samples=1"))
    plan = samples.plan()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="was changed while a run validates on it"):
        samples.read(plan[0])


def test_nothing_to_validate_on_is_said_in_one_line(demo_config: MakeConfig, tmp_path: Path) -> None:
    folder = _texts(tmp_path / "texts", "red")
    (folder / "shard-00000.tar").unlink()
    samples = ValidationSet(demo_config(f"data.validation={folder}", "trainer.eval_samples=1"))
    with pytest.raises(ConfigError, match=r"^data.validation=.*: none of its samples can be used; .*"):
        samples.plan()


def test_a_blend_gives_of_each_as_its_weight_says(demo_config: MakeConfig, tmp_path: Path) -> None:
    _texts(tmp_path / "a", *["red"] * 6)
    _texts(tmp_path / "b", *["red"] * 6)
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  val:\n    blend:\n"
        "      - {path: a, weight: 3, split_part: val}\n      - {path: b, weight: 1, split_part: val}\n"
    )
    plan = ValidationSet(demo_config(f"data.validation={blend}", "trainer.eval_samples=4")).plan()
    folders = [Path(each.shard).parent.name for planned in plan for each in planned]
    assert sorted(folders) == ["a", "a", "a", "b"]
    sets = read_data_sets(blend, "val", "data.validation")
    for count in range(1, 30):
        assert sum(shares_of(sets, count)) == count


def test_the_filler_holds_no_sample(demo_config: MakeConfig) -> None:
    cfg = demo_config("trainer.eval_samples=1", "reduction.select.multiple_of=8")
    filler = ValidationSet(dataclasses.replace(cfg)).filler()
    assert (filler.keys, len(filler.input_ids), filler.num_loss_tokens) == ([""], 8, 1)
