"""A checkpoint that comes from somebody else: nothing of it runs, nothing outside of it is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.engine.checkpoint import load_checkpoint
from hybridprune_megatron.engine.checkpoint_index import read_index
from hybridprune_megatron.engine.weights import load_initial_weights
from tests.hostile.conftest import Refused, script

WEIGHT = "language_model.embedding.word_embeddings.weight"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_00000010"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def change(folder: Path, how: Callable[[Metadata], None]) -> None:
    """Changes the index; only a test may unpickle it."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    how(index)
    path.write_bytes(pickle.dumps(index))


def store(folder: Path, content: Any) -> _StorageInfo:
    """Another file of the checkpoint with one stored object."""
    stream = io.BytesIO()
    torch.save(content, stream)
    (folder / "more.distcp").write_bytes(stream.getvalue())
    return _StorageInfo("more.distcp", 0, len(stream.getvalue()))


def place_of(index: Metadata, key: str = WEIGHT) -> MetadataIndex:
    return next(each for each in index.storage_data if each.fqn == key)


def as_bytes(folder: Path, key: str, content: Any) -> None:
    """Makes an entry one of bytes, whatever it was."""

    def how(index: Metadata) -> None:
        for each in [each for each in index.storage_data if each.fqn == key]:
            del index.storage_data[each]
        # With a size, for megatron looks at that before anything is read.
        size = getattr(index.state_dict_metadata.get(key), "size", None)
        index.state_dict_metadata[key] = BytesStorageMetadata()
        vars(index.state_dict_metadata[key]).update({"size": size} if size is not None else {})
        index.storage_data[MetadataIndex(key)] = store(folder, content)

    change(folder, how)


def test_the_unchanged_checkpoint_loads_also_by_a_link(tiny: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items() if value is not None}
    (tmp_path / "latest").symlink_to(folder)
    for path in (folder, tmp_path / "latest"):
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.zero_()
        load_initial_weights(tiny.model, path, tiny.cfg.model)
        after = tiny.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    read_index(folder).check_objects()


def test_a_weight_that_is_bytes_is_never_unpickled(
    tiny: SimpleNamespace, run_dir: Path, folder: Path, mark: Path, refused: Refused, tmp_path: Path
) -> None:
    as_bytes(folder, WEIGHT, Bomb(mark))
    with pytest.raises(ValueError, match=rf"stores {WEIGHT} as bytes that would be unpickled"):
        load_initial_weights(tiny.model, folder)
    main = script("export_hf").main
    line = refused(lambda: main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "hf")]))
    assert "as bytes that would be unpickled" in line
    line = refused(lambda: script("save_weights").main(["--checkpoint", str(folder), "--out", str(tmp_path / "w")]))
    assert "as bytes that would be unpickled" in line
    with ShardWriter(tmp_path / "set", "val") as writer:
        writer.add("a", [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}], [])
    line = refused(lambda: script("analyze", "recipes").main([f"checkpoint={run_dir}", f"data={tmp_path / 'set'}"]))
    assert "as bytes that would be unpickled" in line
    with pytest.raises(ValueError, match=f"{WEIGHT} is more than plain values and tensors"):
        load_checkpoint(folder, None)  # type: ignore[arg-type]  # refused before it is looked at
    assert not mark.exists()
    assert not (tmp_path / "hf").exists()


def test_other_objects_are_not_looked_at_for_weights_and_end_a_resume(
    tiny: SimpleNamespace, folder: Path, mark: Path
) -> None:
    # Megatron itself unpickles this one, whatever is loaded.
    as_bytes(folder, "common_state/shard_0_1", [Bomb(mark)])
    load_initial_weights(tiny.model, folder)
    with pytest.raises(ValueError, match=r"common_state/shard_0_1 is more than plain values and tensors"):
        load_checkpoint(folder, None)  # type: ignore[arg-type]
    torch.save(Bomb(mark), folder / "common.pt")
    load_initial_weights(tiny.model, folder)
    assert not mark.exists()


def test_a_bomb_in_the_place_of_a_tensor_is_refused(tiny: SimpleNamespace, folder: Path, mark: Path) -> None:
    change(folder, lambda index: index.storage_data.update({place_of(index): store(folder, Bomb(mark))}))
    with pytest.raises(ValueError, match=rf"{WEIGHT} in .*more.distcp is not a stored tensor .*do not load"):
        load_initial_weights(tiny.model, folder)
    assert not mark.exists()


def _index_of(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations) + b"."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_index_of(b"cposix\nsystem\n(S'true'\ntR"), "would import posix.system"),
        (_index_of(b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR"), r"would import .*os\.system"),
        (_index_of(b"cbuiltins\neval\n(S'1'\ntR"), "would import builtins.eval"),
        # Would set an attribute of torch's own class.
        (_index_of(b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'x'\nI1\nstb"), "missing 1 required"),
        (_index_of(b"}"), "expected a Metadata where it has dict"),
        (
            _index_of(b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81"),
            "expected a Metadata where it has Metadata",
        ),
        (b"", "Ran out of input"),
        (b"\x80\x04garbage", "not a checkpoint index"),
        (_index_of(b"\x8e" + (2**62).to_bytes(8, "little")), "not a checkpoint index"),
    ],
)
def test_an_index_of_something_else_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        read_index(folder)
    assert "\n" not in str(raised.value)


def _part(**fields: Any) -> Callable[[Path, Metadata], None]:
    def how(folder: Path, index: Metadata) -> None:
        (folder.parent / "outside.distcp").write_bytes(b"0" * 10**6)
        (folder / "link.distcp").symlink_to(folder.parent / "outside.distcp")
        vars(index.storage_data[place_of(index)]).update(fields)

    return how


def _tensor(**fields: Any) -> Callable[[Path, Metadata], None]:
    return lambda folder, index: vars(index.state_dict_metadata[WEIGHT]).update(fields)


def _chunk(**fields: Any) -> Callable[[Path, Metadata], None]:
    return lambda folder, index: vars(index.state_dict_metadata[WEIGHT].chunks[0]).update(fields)


def _lost(folder: Path, index: Metadata) -> None:
    index.state_dict_metadata[WEIGHT].chunks.clear()


def _stored(content: Any) -> Callable[[Path, Metadata], None]:
    return lambda folder, index: index.storage_data.update({place_of(index): store(folder, content)})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (_part(relative_path="/etc/hostname"), "names the file '/etc/hostname'"),
        (_part(relative_path="../outside.distcp"), "only names of files in the folder itself"),
        (_part(relative_path="link.distcp"), "is a link to .*outside.distcp, outside of the folder"),
        (_part(relative_path=["x"]), "not a checkpoint index"),
        (_part(relative_path="nowhere.distcp"), "of 0 bytes of nowhere.distcp"),
        (_part(offset=-1), "lies at -1"),
        (_part(length=10**18), r"to \+1000000000000000000"),
        (_part(length=True), "lies at"),
        (_part(transform_descriptors=["zstd"]), "is stored as"),
        (_tensor(size=torch.Size([288, 31])), "outside of"),
        (_tensor(size=torch.Size([10**12, 32])), r"mismatch of .*, \(1000000000000, 32\) there"),
        (_tensor(size=(288, -1)), "is not a shape"),
        (_tensor(properties=None), "not a checkpoint index"),
        (_chunk(offsets=torch.Size([1, 0])), r"at \(1, 0\) of size \(288, 32\), outside of"),
        (_chunk(sizes=torch.Size([288])), "outside of"),
        (_lost, "0 of 9216 elements are stored"),
        (_stored(torch.zeros(288, 31)), "is not the tensor that the index says"),
        (_stored(torch.zeros(288, 32, dtype=torch.int8)), "is not the tensor that the index says"),
        (_stored(torch.zeros(288, 32, device="meta")), "is not the tensor that the index says"),
        (_stored(torch.zeros(288, 32).to_sparse()), "is not the tensor that the index says"),
        (_stored({"a": 1}), "is not the tensor that the index says"),
        (_stored(torch.full((288, 32), torch.nan)), "9216 values that are NaN or infinite"),
        (lambda folder, index: index.state_dict_metadata.pop(WEIGHT), f"has no weight '{WEIGHT}'"),
        (
            lambda folder, index: index.state_dict_metadata.update(
                {"language_model.decoder.layers.9.norm.weight": index.state_dict_metadata[WEIGHT]}
            ),
            "not a checkpoint index",
        ),
    ],
)
def test_an_index_that_lies_is_refused(
    tiny: SimpleNamespace, folder: Path, how: Callable[[Path, Metadata], None], words: str
) -> None:
    change(folder, lambda index: how(folder, index))
    with pytest.raises(ValueError, match=words) as raised:
        load_initial_weights(tiny.model, folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_without_scales_are_refused(tiny: SimpleNamespace, folder: Path, dtype: torch.dtype) -> None:
    def how(index: Metadata) -> None:
        index.state_dict_metadata[WEIGHT].properties.dtype = dtype
        index.storage_data[place_of(index)] = store(folder, torch.ones(288, 32).to(dtype))

    change(folder, how)
    with pytest.raises(ValueError, match=f"{WEIGHT} is {str(dtype)[6:]}, which needs scales"):
        load_initial_weights(tiny.model, folder)


def test_a_deeper_model_is_not_cut_to_fit(tiny: SimpleNamespace, folder: Path) -> None:
    extra = "language_model.decoder.layers.9.mlp.linear_fc1.weight"

    def how(index: Metadata) -> None:
        index.state_dict_metadata[extra] = index.state_dict_metadata[WEIGHT]
        index.storage_data[MetadataIndex(extra, (0, 0))] = index.storage_data[place_of(index)]

    change(folder, how)
    with pytest.raises(ValueError, match=f"holds weights that the model lacks: {extra}"):
        load_initial_weights(tiny.model, folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"sharded_backend": "zarr", "sharded_backend_version": 1}', "sharded_backend='zarr': only torch_dist"),
        ("[]", "sharded_backend=None"),
        ("{", "metadata.json cannot be read"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_another_format_is_refused(tiny: SimpleNamespace, folder: Path, content: str, words: str) -> None:
    (folder / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        load_initial_weights(tiny.model, folder)
    assert "\n" not in str(raised.value)


def _config(**groups: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    def how(header: dict[str, Any]) -> Any:
        for name, values in groups.items():
            header["config"][name] |= values
        return header

    return how


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda header: [], "is not a JSON object"),
        (lambda header: {"step": 1}, "has no configuration"),
        (lambda header: header | {"config": [1]}, "has no configuration"),
        (lambda header: header | {"config": {}}, "has no model.hybrid_pattern"),
        (_config(model={"hybrid_pattern": ["M"]}), "has no model.hybrid_pattern"),
        (_config(model={"hidden_size": "wide"}), "hidden_size|not a whole number|could not be converted"),
        (_config(model={"hidden_size": -1}), "hidden_size=-1"),
        (_config(model={"hidden_size": 2**40}), "hidden_size|cannot be built|mismatch"),
        (_config(model={"unknown": 1}), "unknown"),
        (_config(model={"name": "${oc.env:HOME}"}), "not a resolved value"),
        (_config(data={"tokenizer": "${oc.env:HOME}"}), "not a resolved value"),
        (_config(reduction={"budget": 5}), "reduction.budget=5"),
        (_config(reduction={"budget": "x" * 50}), "budget"),
        (_config(reduction={"layers": {"a": 1}}), "reduction.layers"),
        (_config(reduction={"schedule": {"name": "listed", "retention": [1.0, "a"]}}), "retention"),
        (_config(reduction={"schedule": {"name": "listed", "retention": [0.5]}}), "reduction.schedule.retention"),
    ],
)
def test_a_run_file_that_is_wrong_ends_an_export_in_one_line(
    run_dir: Path, folder: Path, refused: Refused, tmp_path: Path, how: Callable[[dict[str, Any]], Any], words: str
) -> None:
    header = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(how(header)))
    line = refused(lambda: script("export_hf").main(["--checkpoint", str(folder), "--out", str(tmp_path / "hf")]))
    assert re.search(words, line), line
    assert not (tmp_path / "hf").exists()


def test_what_a_run_says_of_itself_may_be_anything(folder: Path, run_dir: Path) -> None:
    from hybridprune_megatron.export.model_card import read_facts

    header = json.loads((folder / "run.json").read_text())
    for wrong in ([1], "x", {"a": [1]}, 2**70, None):
        strange = dict.fromkeys(("step", "consumed_samples", "commit", "versions", "accuracy"), wrong)
        (folder / "run.json").write_text(json.dumps(header | strange))
        (run_dir / "report.json").write_text(json.dumps({"steps": wrong, "accuracy": wrong}))
        (run_dir / "train_log.jsonl").write_text('{"step": 1, "loss": "a"}\n{"loss": NaN}\n')
        read_facts(folder)
