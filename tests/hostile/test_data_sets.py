"""A folder of shards or a blend may say anything: nothing it names is called, nothing outside of it is opened."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import check_data_sets, read_data_sets, shard_counts
from hybridprune_megatron.data.task_encoder import TrainLoader
from tests.hostile.folders import config, write_set

RUNS = "import pathlib\npathlib.Path('{ran}').touch()\ndef load(raw): return raw\n"
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
BLEND = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of one sample each."""
    folder = tmp_path_factory.mktemp("good") / "set"
    return write_set(folder, (f"text-{number}" for number in range(12)), samples_per_shard=1)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "set"))


def refused(path: Path, *holds: str, part: str = "train") -> str:
    """The line that refuses a path, at once."""
    with pytest.raises(ConfigError) as caught:
        read_data_sets(path, part, "data.train")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1500
    assert f"data.train={path} is not an Energon data set that can be read" in line
    for each in holds:
        assert each in line
    return line


# ---- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("braces", [False, True])
def test_what_make_shards_and_energon_write_is_read(folder: Path, braces: bool) -> None:
    if braces:
        split = {"split_parts": {"train": ["shard-{00000..00009}.tar", "shard-000{10,11}.tar"]}, "exclude": []}
        (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    (found,) = read_data_sets(folder, "train", "data.train")
    assert found.shards == tuple((f"shard-{number:05d}.tar", 1) for number in range(12))
    loader = TrainLoader(config(folder), 0, 1)
    keys = {key for batch in itertools.islice(loader, 6) for key in batch.keys}
    assert keys <= {f"text-{number}" for number in range(12)}
    assert len(keys) > 3


def test_blends_in_blends_are_read_with_their_weights(good: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other", ["a", "b"], "val")
    blend = {"splits": {"train": {"blend": [{"weight": 1, "path": "inner.yaml"}, {"path": str(good), "weight": 3}]}}}
    inner = {"splits": {"train": {"blend": [{"path": "other", "split_part": "val"}, {"path": "./set", "weight": 4.0}]}}}
    shutil.copytree(good, tmp_path / "set")
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump({**BLEND, **blend}))
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump({**BLEND, **inner}))
    sets = read_data_sets(tmp_path / "blend.yaml", "train", "data.train")
    assert [(each.folder, each.part, each.weight) for each in sets] == [
        (other.resolve(), "val", pytest.approx(0.25 * 0.2)),
        ((tmp_path / "set").resolve(), "train", pytest.approx(0.25 * 0.8)),
        (good.resolve(), "train", 0.75),
    ]
    keys = {
        key for batch in itertools.islice(TrainLoader(config(tmp_path / "blend.yaml"), 0, 1), 12) for key in batch.keys
    }
    assert any(key.startswith("text") for key in keys)


def test_excluded_shards_and_samples_are_left_out(folder: Path) -> None:
    split = {
        "split_parts": {"train": ["shard-{00000..00002}.tar"]},
        "exclude": ["shard-00000.tar", "shard-00001.tar/text-1"],
    }
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    loader = TrainLoader(config(folder), 0, 1)
    assert {key for batch in itertools.islice(loader, 6) for key in batch.keys} == {"text-2"}


# ---- code -----------------------------------------------------------------------------------------------------------

DESCRIPTIONS: dict[str, str] = {
    "a function of the standard library": "__module__: os\n__function__: system\ncommand: touch {ran}\n",
    "a class of the standard library": "__module__: subprocess\n__class__: Popen\nargs: [touch, '{ran}']\n",
    "a loader in the folder": "__module__: megatron.energon\n__class__: Sample\nsample_loader: code.py:load\n",
    "a filter in the folder": f"{CRUDE}part_filter: code.py:load\n",
    "no type": "sample_type: {{__module__: megatron.energon, __class__: TextSample}}\nsample_loader: code.py:load\n"
    "part_filter: code.py:load\n",
    "deep in the subflavors": f"{CRUDE}"
    "subflavors: {{a: {{__module__: os, __function__: system, command: touch {ran}}}}}\n",
    "a YAML tag": "!!python/object/apply:os.system ['touch {ran}']\n",
    "a decoder": f"{CRUDE}decoder: {{{{__module__: os, __class__: PathLike}}}}\n",
    "another class of Energon": "__module__: megatron.energon\n__class__: CaptioningWebdataset\n",
    "another module": "__module__: code\n__class__: CrudeWebdataset\n",
    "a list": "- __module__: megatron.energon\n",
    "nothing": "",
    "aliases": "a: &a [b, b]\nb: [*a, *a]\n",
    "brackets": "[" * 100_000,
    "no YAML": "a: b: c: {{",
    "two documents": f"{CRUDE}---\n__module__: os\n__function__: getcwd\n",
    "no text": "\xff\xfe",
    "four megabytes": "# " + "x" * 2**22,
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_a_description_names_is_not_called(folder: Path, tmp_path: Path, name: str) -> None:
    meta = folder / ".nv-meta"
    (meta / "code.py").write_text(RUNS.format(ran=tmp_path / "ran"))
    text = DESCRIPTIONS[name].format(ran=tmp_path / "ran") if name != "brackets" else DESCRIPTIONS[name]
    (meta / "dataset.yaml").write_text(text, encoding="latin-1")
    refused(folder, "dataset.yaml")
    with pytest.raises(ConfigError, match=r"dataset\.yaml"):
        TrainLoader(config(folder), 0, 1)
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_described_are_refused(folder: Path, tmp_path: Path) -> None:
    meta = folder / ".nv-meta"
    shutil.copy(meta / "dataset.yaml", tmp_path / "outside.yaml")
    for name in ("dataset.yaml", "split.yaml", ".info.json"):
        text = (meta / name).read_text()
        (meta / name).unlink()
        refused(folder, name)
        (meta / name).symlink_to(tmp_path / "outside.yaml")
        refused(folder, name, "leads out of")
        (meta / name).unlink()
        # A pipe is not waited for.
        os.mkfifo(meta / name)
        refused(folder, name, "is not a file")
        (meta / name).unlink()
        (meta / name).write_text(text)
    read_data_sets(folder, "train", "data.train")
    (tmp_path / "rows.jsonl").write_text("{}\n" * 10)
    refused(tmp_path / "rows.jsonl")
    refused(tmp_path)
    refused(tmp_path / "none")
    (meta / "split.yaml").write_text("split_parts: {train: []}")
    refused(folder, "no shards for train")


# ---- other files ----------------------------------------------------------------------------------------------------


def rename(folder: Path, old: str, new: str) -> None:
    """Gives a shard another name in both files that name it."""
    info, split = folder / ".nv-meta" / ".info.json", folder / ".nv-meta" / "split.yaml"
    counts = json.loads(info.read_text())["shard_counts"]
    names = [new if name == old else name for name in counts]
    info.write_text(json.dumps({"shard_counts": dict(zip(names, counts.values()))}))
    split.write_text(yaml.safe_dump({"split_parts": {"train": names, "val": [], "test": []}, "exclude": []}))


@pytest.mark.parametrize(
    "name",
    [
        "{outside}/secret.tar",
        "../secret.tar",
        "sub/../../secret.tar",
        "./shard-00000.tar",
        "sub//secret.tar",
        "file://{outside}/secret.tar",
        "msc://profile/secret.tar",
        "s3://bucket/secret.tar",
        "https://example.com/secret.tar",
        "pipe:cat secret.tar",
        "link.tar",
        "linked/secret.tar",
        "pipe.tar",
        "linked-index.tar",
        "{outside}/secret",
        "shard\\00000.tar",
        "line\nbreak.tar",
        "nul\0.tar",
        "bell\a.tar",
        "",
        "n" * 5000 + ".tar",
    ],
)
def test_shards_outside_of_the_folder_are_not_opened(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for suffix in ("", ".idx"):
        shutil.copy(folder / f"shard-00000.tar{suffix}", outside / f"secret.tar{suffix}")
        (folder / f"link.tar{suffix}").symlink_to(outside / f"secret.tar{suffix}")
    shutil.copy(folder / "shard-00000.tar", folder / "linked-index.tar")
    (folder / "linked-index.tar.idx").symlink_to(outside / "secret.tar.idx")
    (folder / "linked").symlink_to(outside)
    os.mkfifo(folder / "pipe.tar")
    rename(folder, "shard-00000.tar", name.replace("{outside}", str(outside)))
    refused(folder)
    for read in (lambda: shard_counts(folder, "--data"), lambda: TrainLoader(config(folder), 0, 1)):
        with pytest.raises(ConfigError):
            read()


@pytest.mark.parametrize(
    "names",
    [
        ["shard-{0..999999999}.tar"],
        ["shard-{00000..00011}{00000..00011}.tar"],
        ["{a,b}" * 40],
        ["{a,{b,c}}.tar"],
        ["{a.tar"],
        ["a}.tar"],
        ["{}"],
        ["{a..z}.tar"],
        ["{1..3..2}.tar"],
        ["\\{1..2\\}.tar"],
        ["shard-0000{0,0}.tar"],
        ["{../,}secret.tar"],
        ["shard-{00000,/etc/x}.tar"],
        ["shard-00000.tar"] * 2,
        ["shard-00099.tar"],
        [5],
        [None],
        [["shard-00000.tar"]],
        "shard-00000.tar",
        {"a": 1},
        [],
        None,
    ],
)
def test_a_split_names_shards_of_the_folder_once(folder: Path, names: Any) -> None:
    file = folder / ".nv-meta" / "split.yaml"
    file.write_text(yaml.safe_dump({"split_parts": {"train": names, "val": []}, "exclude": []}))
    refused(folder)


@pytest.mark.parametrize("names", [["{0..999999999}"], ["{a,b}" * 40], ["{a,{b,c}}"], [5], "a", {"a": 1}, None])
def test_what_is_excluded_are_names(folder: Path, names: Any) -> None:
    split = {"split_parts": {"train": ["shard-00000.tar"]}, "exclude": names}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    refused(folder)


@pytest.mark.parametrize(
    "count", [10**9, 10**7, -1, True, 1.0, 1.5, "1", None, [1], {"a": 1}, 10**90], ids=lambda count: repr(count)[:20]
)
def test_counts_are_those_of_shards(folder: Path, count: Any) -> None:
    file = folder / ".nv-meta" / ".info.json"
    info = json.loads(file.read_text())
    info["shard_counts"]["shard-00003.tar"] = count
    file.write_text(json.dumps(info))
    refused(folder, ".info.json")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"shard_counts": {"\\ud800.tar": 1}}',
        '{"shard_counts": {"a.tar": NaN}}',
        '{"shard_counts": {"a.tar": ' + "9" * 5000 + "}}",
        '{"shard_counts": []}',
        '{"shard_counts": {}}',
        '{"shard_counts": {"a.tar": 1}, "__module__": "os"}',
        "[]",
        "\0" * 600,
        "",
    ],
)
def test_an_info_file_of_anything_else_is_refused(folder: Path, text: str) -> None:
    (folder / ".nv-meta" / ".info.json").write_text(text)
    refused(folder)


# ---- blends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "set", "weight": float("nan")},
        {"path": "set", "weight": float("inf")},
        {"path": "set", "weight": 0},
        {"path": "set", "weight": -1},
        {"path": "set", "weight": 1e300},
        {"path": "set", "weight": 1e-300},
        {"path": "set", "weight": True},
        {"path": "set", "weight": "1"},
        {"path": "set", "weight": 10**400},
        {"path": "set", "weight": None},
        {"path": "set", "aux": {"a": "filesystem:///"}},
        {"path": "set", "subflavors": {"a": {"__module__": "os", "__function__": "getcwd"}}},
        {"path": "set", "dataset_config": "other.yaml"},
        {"path": "set", "split_config": "/other.yaml"},
        {"path": "set", "subset": {"range": [0, 1]}},
        {"path": "set", "shuffle_over_epochs_multiplier": -1},
        {"path": "set", "split_part": "../x"},
        {"path": "set", "split_part": ["train"]},
        {"join": [{"path": "set"}], "joiner": {"__module__": "os", "__function__": "getcwd"}},
        {"path": "msc://profile/set"},
        {"path": "filesystem:///set"},
        {"path": "rows.jsonl"},
        {"path": "set/.nv-meta/split.yaml"},
        {"path": "none"},
        {"path": "nul\0"},
        {"path": ["set"]},
        {"path": None},
        {"weight": 1},
        {"__module__": "os", "__function__": "getcwd"},
        "set",
        5,
        None,
        [{"path": "set"}],
        {"path": "blend.yaml"},
        {"path": "circle.yaml"},
    ],
    ids=lambda entry: repr(entry)[:50],
)
def test_a_blend_names_folders_and_weights_alone(folder: Path, entry: Any) -> None:
    file = folder.parent / "blend.yaml"
    (folder.parent / "rows.jsonl").write_text('{"a": 1}\n')
    circle = {**BLEND, "splits": {"train": {"path": "blend.yaml"}}}
    (folder.parent / "circle.yaml").write_text(yaml.safe_dump(circle))
    file.write_text(yaml.safe_dump({**BLEND, "splits": {"train": {"blend": [{"path": "set"}, entry]}}}))
    refused(file)


@pytest.mark.parametrize(
    "content",
    [
        {"splits": {"train": {"path": "set"}}},
        {**BLEND, "path": "/", "splits": {"train": {"path": "set"}}},
        {**BLEND, "__class__": "Metadataset", "splits": {"train": {"path": "set"}}},
        {**BLEND, "__module__": "code", "splits": {"train": {"path": "set"}}},
        {"__module__": "os", "__function__": "system", "command": "true"},
        {**BLEND, "splits": {"train": {"blend_epochized": [{"path": "set", "repetitions": 1}]}}},
        {**BLEND, "splits": {"train": {"blend": [{"path": "set"}], "subset": {"range": [0, 1]}}}},
        {**BLEND, "splits": {"train": {"blend": []}}},
        {**BLEND, "splits": {"train": {"blend": [{"path": "set"}] * 1001}}},
        {**BLEND, "splits": {"val": {"path": "set"}}},
        {**BLEND, "splits": []},
        {**BLEND},
        [],
        "text",
    ],
    ids=lambda content: repr(content)[:60],
)
def test_a_blend_is_a_plain_one(folder: Path, content: Any) -> None:
    file = folder.parent / "blend.yaml"
    file.write_text(yaml.safe_dump(content))
    refused(file)


def test_many_blends_in_blends_are_soon_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridprune_megatron.config.data_sets._MOST_SETS", 20)
    for depth in range(8):
        entries = [{"path": f"{depth + 1}.yaml" if depth < 7 else "set"} for _ in range(20)]
        (folder.parent / f"{depth}.yaml").write_text(yaml.safe_dump({**BLEND, "splits": {"train": {"blend": entries}}}))
    refused(folder.parent / "0.yaml", "more than 20 data sets")


# ---- before anything is slow ----------------------------------------------------------------------------------------


def test_a_run_looks_at_its_data_first(folder: Path, good: Path) -> None:
    check_data_sets(config(good))
    with pytest.raises(
        ConfigError, match=r"trainer.global_batch_size=32.* 32 readers for the 12 samples of data.train="
    ):
        check_data_sets(config(good, "trainer.global_batch_size=32"))
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: os\n__function__: getcwd\n")
    with pytest.raises(ConfigError, match="which could run code"):
        check_data_sets(config(folder))


def test_a_blend_holds_videos_or_features(good: Path, tmp_path: Path) -> None:
    from hybridprune_megatron.config.features import FeaturesInfo

    for number in range(2):
        shutil.copytree(good, tmp_path / f"set-{number}")
    info = FeaturesInfo("0123456789abcdef", 128, 16, 512, "data.sampling=uniform data.num_frames=8", "fp32")
    (tmp_path / "set-0" / "features.json").write_text(info.to_json())
    blend = {**BLEND, "splits": {"train": {"blend": [{"path": f"set-{number}"} for number in range(2)]}}}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    cfg = config(tmp_path / "blend.yaml", "model.trainable.vision=false")
    with pytest.raises(ConfigError, match="blends features of tower 0123456789abcdef, videos: blend either"):
        check_data_sets(cfg)
    (tmp_path / "set-0" / "features.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"features\.json cannot be read"):
        check_data_sets(cfg)
