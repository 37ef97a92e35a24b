"""Data sets in an object store: read as local ones are, and what is wrong with a store is one line in seconds."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import Config
from hybridprune_megatron.config.data_sets import read_data_sets
from hybridprune_megatron.config.own_keys import data_path
from hybridprune_megatron.config.stores import StoreError, StorePath, _s3_client, located
from hybridprune_megatron.data.batch import PackedBatch
from hybridprune_megatron.data.task_encoder import TrainLoader
from hybridprune_megatron.data.validation_set import ValidationSet

from .s3_server import StoreServer, serve

MakeConfig = Callable[..., Config]
BLEND = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}


@pytest.fixture(scope="module")
def buckets(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with the demo's two data sets and a blend of them."""
    root = tmp_path_factory.mktemp("buckets")
    shutil.copytree(demo_data, root / "bucket" / "sets")
    parts = [{"weight": 3, "path": "../sets/train"}, {"path": "../sets/validation", "split_part": "val"}]
    (root / "bucket" / "blends").mkdir()
    (root / "bucket" / "blends" / "blend.yaml").write_text(
        yaml.safe_dump({**BLEND, "splits": {"train": {"blend": parts}}})
    )
    return root


@pytest.fixture
def store(buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """A running store; the environment says where, and who reads."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # Neither the files nor the metadata service of the machine that the tests run on.
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws_config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws_credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    _s3_client.cache_clear()
    with serve(buckets) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
    _s3_client.cache_clear()


def take(loader: Any, count: int) -> list[PackedBatch]:
    return list(islice(loader, count))


def assert_equal_batches(ours: list[PackedBatch], theirs: list[PackedBatch]) -> None:
    assert [batch.keys for batch in ours] == [batch.keys for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.pixel_values, other.pixel_values)


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_training_reads_and_resumes_as_from_a_local_folder(
    demo_config: MakeConfig, store: StoreServer, workers: int
) -> None:
    local = TrainLoader(demo_config(f"data.num_workers={workers}"), 0, 1)
    cfg = demo_config(f"data.num_workers={workers}", "data.train=s3://bucket/sets/train")
    loader = TrainLoader(cfg, 0, 1)
    batches, expected = iter(loader), iter(local)
    assert_equal_batches(take(batches, 3), take(expected, 3))
    state = loader.save_state()
    wanted = take(expected, 6)
    assert_equal_batches(take(batches, 6), wanted)
    resumed = TrainLoader(cfg, 0, 1)
    resumed.load_state(state)
    assert_equal_batches(take(resumed, 6), wanted)
    assert {line.split()[0] for line in store.asked} == {"GET", "HEAD"}
    if not workers:
        # A copy of the data elsewhere continues the run too.
        moved = TrainLoader(demo_config(), 0, 1)
        moved.load_state(state)
        assert_equal_batches(take(moved, 6), wanted)


def test_a_blend_in_a_store_names_parts_beside_it(demo_config: MakeConfig, store: StoreServer, buckets: Path) -> None:
    cfg = demo_config("data.train=s3://bucket/blends/blend.yaml")
    local = demo_config(f"data.train={buckets}/bucket/blends/blend.yaml")
    assert_equal_batches(take(TrainLoader(cfg, 0, 1), 8), take(TrainLoader(local, 0, 1), 8))


def test_validation_reads_the_samples_of_a_local_folder(demo_config: MakeConfig, store: StoreServer) -> None:
    ours = ValidationSet(demo_config("data.validation=s3://bucket/sets/validation", "trainer.eval_samples=4"))
    local = ValidationSet(demo_config("trainer.eval_samples=4"))
    plan, wanted = ours.plan(), local.plan()
    assert [[sample.number for sample in each] for each in plan] == [
        [sample.number for sample in each] for each in wanted
    ]
    for one, other in zip(plan, wanted, strict=True):
        (batch, used), (expected, _) = ours.read(one), local.read(other)
        assert all(used)
        assert batch is not None
        assert expected is not None
        assert_equal_batches([batch], [expected])


def test_features_in_a_store_are_seen(store: StoreServer, buckets: Path) -> None:
    from hybridprune_megatron.config.data_sets import features_of
    from hybridprune_megatron.config.features import FeaturesInfo

    info = FeaturesInfo("0123456789abcdef", 128, 16, 512, "data.sampling=uniform data.num_frames=8", "fp32")
    shutil.copytree(buckets / "bucket/sets/train", buckets / "other/features")
    (buckets / "other/features/features.json").write_text(info.to_json())
    sets = read_data_sets("s3://other/features", "train", "data.train")
    assert features_of(sets, "data.train") == info


def test_a_store_of_multi_storage_client(
    demo_config: MakeConfig, buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = {"type": "file", "options": {"base_path": str(buckets / "bucket")}}
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump({"profiles": {"tests-folder": {"storage_provider": storage}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    paths = [f"data.{name}=msc://tests-folder/sets/{name}" for name in ("train", "validation")]
    cfg, local = demo_config("trainer.eval_samples=4", *paths), demo_config("trainer.eval_samples=4")
    assert_equal_batches(take(TrainLoader(cfg, 0, 1), 6), take(TrainLoader(local, 0, 1), 6))
    ours, theirs = ([len(planned) for planned in ValidationSet(each).plan()] for each in (cfg, local))
    assert ours == theirs


def test_a_lost_answer_is_asked_for_again(demo_config: MakeConfig, store: StoreServer) -> None:
    loader = TrainLoader(demo_config("data.train=s3://bucket/sets/train"), 0, 1)
    store.fails += [503, 500]
    assert_equal_batches(take(loader, 4), take(TrainLoader(demo_config(), 0, 1), 4))
    assert not store.fails


def test_a_store_that_goes_away_ends_the_run_and_skips_nothing(
    demo_config: MakeConfig, store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridprune_megatron.config.stores._PATIENT", (2, 2))
    loader = TrainLoader(demo_config("data.train=s3://bucket/sets/train", "data.max_bad_share=0.9"), 0, 1)
    store.known = "nobody"
    with pytest.raises(ConfigError, match="s3://bucket refuses these credentials"):
        take(loader, 4)


# ---- what is wrong --------------------------------------------------------------------------------------------------


def refused(demo_config: MakeConfig, path: str) -> str:
    """The line that refuses a path, at once and before anything slow."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        demo_config(f"data.train={path}")
    assert time.monotonic() - start < 30
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"data.train={path}")
    assert len(line) < 900
    return line


def test_what_is_not_there(demo_config: MakeConfig, store: StoreServer) -> None:
    assert "there is no bucket other-bucket" in refused(demo_config, "s3://other-bucket/sets/train")
    assert "nothing lies in s3://bucket/sets/none" in refused(demo_config, "s3://bucket/sets/none")
    assert ".info.json is not a file" in refused(demo_config, "s3://bucket/sets")
    assert "no samples for train, but for val" in refused(demo_config, "s3://bucket/sets/validation")


def test_credentials(
    demo_config: MakeConfig, store: StoreServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    _s3_client.cache_clear()
    assert "refuses these credentials" in refused(demo_config, "s3://bucket/sets/train")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    _s3_client.cache_clear()
    line = refused(demo_config, "s3://bucket/sets/train")
    assert "no credentials for s3://bucket: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line
    # Its own file says it as well.
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "aws_credentials").write_text("[lab]\naws_access_key_id = reader\naws_secret_access_key = secret\n")
    (tmp_path / "aws_config").write_text(f"[profile lab]\nendpoint_url = {store.url}\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    _s3_client.cache_clear()
    demo_config("data.train=s3://bucket/sets/train")
    monkeypatch.setenv("AWS_PROFILE", "laboratory")
    _s3_client.cache_clear()
    assert "laboratory" in refused(demo_config, "s3://bucket/sets/train")


def test_nobody_answers(demo_config: MakeConfig, store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        _s3_client.cache_clear()
        assert "s3://bucket cannot be reached" in refused(demo_config, "s3://bucket/sets/train")
    # A server of something else.
    store.fails += [404] * 9
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    _s3_client.cache_clear()
    assert "cannot be read" in refused(demo_config, "s3://bucket/sets/train")
    store.fails.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    _s3_client.cache_clear()
    assert "no address" in refused(demo_config, "s3://bucket/sets/train")


def test_a_profile_that_is_not_there_or_needs_a_package(
    demo_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    profiles = {
        "tests-azure": {
            "storage_provider": {"type": "azure", "options": {"base_path": "b", "endpoint_url": "http://x"}}
        }
    }
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    assert "tests-none" in refused(demo_config, "msc://tests-none/sets/train")
    assert "pip install azure" in refused(demo_config, "msc://tests-azure/sets/train")
    assert "optional dependency" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "path",
    [
        "gs://bucket/set",
        "file:///set",
        "s3://",
        "s3:///set",
        "s3://bucket/../set",
        "s3://a:b@bucket/set",
        "msc://p/a?b",
    ],
)
def test_other_addresses_are_refused(demo_config: MakeConfig, path: str) -> None:
    assert "give a folder, s3://bucket/path or msc://profile/path" in refused(demo_config, f"'{path}'".strip("'"))


@pytest.mark.parametrize("name", ["s3://other/secret.tar", "../secret.tar", "/secret.tar", "https://example.com/a.tar"])
def test_shards_outside_of_the_folder_are_not_asked_for(
    store: StoreServer, buckets: Path, tmp_path: Path, name: str
) -> None:
    folder = buckets / "hostile" / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(buckets / "bucket/sets/train", folder)
    text = (folder / ".nv-meta/.info.json").read_text().replace("shard-00000.tar", name)
    (folder / ".nv-meta/.info.json").write_text(text)
    with pytest.raises(ConfigError, match="is not an Energon data set that can be read"):
        read_data_sets("s3://hostile/set", "train", "data.train")
    assert not [line for line in store.asked if "secret" in line]


@pytest.mark.parametrize("path", ["s3://bucket/sets/train", "msc://p/sets", "/sets/train", "../../../sets/train"])
def test_a_blend_in_a_store_names_nothing_outside_of_it(store: StoreServer, buckets: Path, path: str) -> None:
    (buckets / "bad").mkdir(exist_ok=True)
    (buckets / "bad/blend.yaml").write_text(yaml.safe_dump({**BLEND, "splits": {"train": {"path": path}}}))
    with pytest.raises(ConfigError, match="is not an Energon data set that can be read"):
        read_data_sets("s3://bad/blend.yaml", "train", "data.train")


def test_what_reads_local_folders_only_says_so() -> None:
    with pytest.raises(ConfigError, match=r"data=s3://bucket/set: .* only a finetuning run reads; give data=<local"):
        data_path(None, "s3://bucket/set")


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_paths_of_a_store_are_put_together_as_paths_are() -> None:
    path = located("s3://bucket/a/b/", "data.train")
    assert isinstance(path, StorePath)
    assert [str(path / "c"), str(path / "../c"), str(path.parent)] == [
        "s3://bucket/a/b/c",
        "s3://bucket/a/c",
        "s3://bucket/a",
    ]
    assert str(path.parent.parent / "c") == "s3://bucket/c"
    assert str((path / "c.tar").with_suffix(".tar.idx")) == "s3://bucket/a/b/c.tar.idx"
    for name in ("../../../c", "/c", "..//../../c"):
        with pytest.raises(ValueError, match="leads out of"):
            path / name
    assert located("a/b", "data.train") == Path("a/b")


def test_a_file_of_a_store_is_read_where_it_is_asked_for(store: StoreServer, buckets: Path) -> None:
    shard = next((buckets / "bucket/sets/train").glob("*.tar"))
    content = shard.read_bytes()
    with StorePath("s3", "bucket", f"sets/train/{shard.name}").open() as file:
        for start, size in ((0, 10), (len(content) - 5, 100), (700, 0), (len(content) + 7, 3), (3, len(content))):
            file.seek(start)
            assert file.read(size) == content[start : start + size]
    with pytest.raises(FileNotFoundError):
        StorePath("s3", "bucket", "sets/none").open()
    with pytest.raises(StoreError):
        StorePath("s3", "none", "sets/none").listed()
