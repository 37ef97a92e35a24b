"""Features in the place of videos: the part, which frames a sampling takes of it, and loaders over such data sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.commands.features import FeatureEncoder, load, source_shards, write_features
from hybridprune_megatron.config import Config
from hybridprune_megatron.config.data_sets import check_data_sets
from hybridprune_megatron.config.features import FEATURES_FILE, FeaturesInfo
from hybridprune_megatron.data.batch import FrameFeatures, no_pixels, pack
from hybridprune_megatron.data.features import StoredFeatures, features_part
from hybridprune_megatron.data.shards import ShardWriter, read_shard
from hybridprune_megatron.data.task_encoder import TrainLoader
from hybridprune_megatron.data.video import FrameSampling, decode_video
from hybridprune_megatron.evaluation.held_out import load_questions
from hybridprune_megatron.method.front import FRONTS
from tests.data.eval_loader import build_eval_loader

from .conftest import encode_clip, grey_frames

MakeConfig = Callable[..., Config]
INFO = FeaturesInfo("0123456789abcdef", 128, 16, 512, "data.sampling=uniform data.num_frames=8", "fp32")
#: Of the clip: the frame rate varies.
TIMES_MS = [0, 40, 80, 200, 240, 300, 420, 460, 500, 700, 740]


class FirstPixels(torch.nn.Module):
    """A tower whose features tell the frame: all channels hold its mean, and counted passes."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.norm = torch.nn.Parameter(torch.ones(1))
        self.patches = (vision.frame_size // vision.patch_size) ** 2
        self.width = vision.hidden_size
        settings = ("num_attention_heads", "layer_norm_eps", "norm_mean", "norm_std")
        self.config = SimpleNamespace(patch_size=vision.patch_size, **dict.fromkeys(settings, 1))
        self.passes: list[int] = []

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        self.passes.append(len(pixels))
        mean = pixels.mean(dim=(1, 2, 3))[:, None, None]
        return SimpleNamespace(features=mean.expand(-1, self.patches, self.width).contiguous())


def encoder(cfg: Config, dtype: str = "fp32", frames: int = 128) -> FeatureEncoder:
    model: Any = SimpleNamespace(vision_model=FirstPixels(cfg.model.vision), pixel_shuffle=0.5)
    return FeatureEncoder(model, cfg, dtype, frames)


def write(source: Path, out: Path, cfg: Config, **settings: Any) -> int:
    return write_features(source, out, source_shards(source), encoder(cfg, **settings))


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encode_clip(grey_frames(len(TIMES_MS)), TIMES_MS)


@pytest.fixture(scope="module")
def features_config(demo_config: MakeConfig, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """The demo's configuration over features of all 8 frames of the tiny data sets."""
    folder = tmp_path_factory.mktemp("features")
    whole = demo_config("data.num_frames=8")
    for split in ("train", "validation"):
        assert write(demo_data / split, folder / split, whole) == 0

    def build(*overrides: str) -> Config:
        paths = [f"data.{split}={folder / split}" for split in ("train", "validation")]
        return demo_config(*paths, "model.trainable.vision=false", *overrides)

    return build


# ---- the part -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_is_a_safetensors_file_and_is_read_without_a_copy(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 5, 7).to(dtype)
    data = features_part(values, [0.0, 0.1, 0.3, 0.7], [0, 2, 3], INFO)
    (tmp_path / "part.safetensors").write_bytes(data)
    with safe_open(tmp_path / "part.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("features"), values)
        assert file.get_tensor("video_seconds").tolist() == [0.0, 0.1, 0.3, 0.7]
    stored = StoredFeatures(data)
    assert stored.info == INFO
    features, seconds = stored.read(FrameSampling(num_frames=3))
    assert torch.equal(features.values, values)
    assert features.tower == INFO.tower
    assert seconds == [0.0, 0.3, 0.7]
    start = np.frombuffer(data, dtype=np.uint8).ctypes.data
    assert start < features.values.data_ptr() < start + len(data)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[9:], lambda data: b"", lambda data: b"{}" * 9]
)
def test_a_damaged_part_is_a_value_error(damage: Callable[[bytes], bytes]) -> None:
    data = damage(features_part(torch.zeros(2, 4, 8), [0.0, 1.0], [0, 1], INFO))
    # A ConfigError would end the job; a bad part is one bad sample.
    with pytest.raises(ValueError, match="a features part w") as caught:
        StoredFeatures(data).read(FrameSampling())
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    "sampling",
    [FrameSampling(num_frames=count) for count in (1, 2, 3, 5, 10, 11, 12)]
    + [FrameSampling("fps", fps=fps, max_frames=most) for fps, most in ((3.0, 128), (7.5, 128), (30.0, 4))],
)
def test_a_sampling_takes_the_frames_it_would_take_from_the_video(clip: bytes, sampling: FrameSampling) -> None:
    everything = decode_video(clip, FrameSampling(num_frames=99), 64)
    marks = torch.arange(len(TIMES_MS), dtype=torch.float32)[:, None, None]
    stored = StoredFeatures(features_part(marks, everything.video_seconds, range(len(TIMES_MS)), INFO))
    decoded = decode_video(clip, sampling, 64)
    features, seconds = stored.read(sampling)
    assert seconds == decoded.seconds == stored.seconds(sampling)
    wanted = [everything.seconds.index(time) for time in decoded.seconds]
    assert features.values.flatten().tolist() == wanted


def test_frames_that_are_not_stored_are_refused() -> None:
    stored = StoredFeatures(features_part(torch.zeros(3, 1, 1), [0.0, 0.5, 1.0, 1.5, 2.0], [0, 2, 4], INFO))
    assert stored.seconds(FrameSampling(num_frames=2)) == [0.0, 2.0]
    assert stored.seconds(FrameSampling("fps", fps=1.0)) == [0.0, 1.0, 2.0]
    with pytest.raises(ConfigError, match=r"2 of the 4 frames that data.sampling=uniform data.num_frames=4 takes") as e:
        stored.read(FrameSampling(num_frames=4))
    assert f"the first at 0.50 s, are not among the 3 of 5 stored by {INFO.sampling}; set data so" in str(e.value)
    assert "\n" not in str(e.value)


# ---- the data set ---------------------------------------------------------------------------------------------------


def turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "end"}]


@pytest.fixture
def odd_set(clip: bytes, tmp_path: Path) -> Path:
    """Three shards: one video, two videos, text only, and a video that cannot be decoded; beside them a file."""
    folder = tmp_path / "odd"
    with ShardWriter(folder, "val", samples_per_shard=2) as writer:
        writer.add("one", turns("<video>\nWhere?"), [("mp4", clip)], {"answer": "end"})
        writer.add("two", turns("<video> or <video>?"), [("mp4", clip), ("webm", clip)])
        writer.add("text", turns("Where?"), [])
        writer.add("broken", turns("<video>\nWhere?"), [("mp4", b"broken")])
        writer.add("last", turns("<video>\nWhere?"), [("mp4", clip)])
        writer.add_file("needles.json", {"chance": 0.5})
    return folder


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    return {key: parts for shard in sorted(folder.glob("*.tar")) for key, parts in read_shard(shard)}


@pytest.mark.parametrize("frames", [3, 128])
def test_everything_but_the_videos_stays_as_it_was(
    demo_config: MakeConfig, odd_set: Path, tmp_path: Path, clip: bytes, frames: int
) -> None:
    cfg, out = demo_config(), tmp_path / "features"
    writer = encoder(cfg, "bf16", frames)
    assert write_features(odd_set, out, source_shards(odd_set), writer) == 1
    assert max(writer.tower.passes) <= frames
    old, new = contents(odd_set), contents(out)
    assert list(new) == list(old) == ["one", "two", "text", "broken", "last"]
    assert list(new["two"]) == ["json", "0.safetensors", "1.safetensors"]
    assert new["broken"] == old["broken"]
    assert all(new[key]["json"] == old[key]["json"] for key in old)
    for name in ("needles.json", ".nv-meta/split.yaml", ".nv-meta/dataset.yaml"):
        assert (out / name).read_bytes() == (odd_set / name).read_bytes()
    assert FeaturesInfo.from_json((out / FEATURES_FILE).read_text()).dtype == "bf16"
    assert sorted(path.name for path in out.glob("*.tar")) == sorted(source_shards(odd_set))
    assert not list(tmp_path.glob(".*"))
    means = decode_video(clip, FrameSampling(num_frames=4), 128).frames.float().div(255).mean(dim=(1, 2, 3))
    for part in (new["one"]["safetensors"], new["two"]["1.safetensors"]):
        values = StoredFeatures(part).read(FrameSampling(num_frames=4))[0].values
        assert values.shape == (4, 16, 512)
        torch.testing.assert_close(values.float()[:, 3, 5], means, rtol=0.01, atol=0)


def test_a_killed_run_goes_on_behind_its_last_finished_shard(
    demo_config: MakeConfig, odd_set: Path, tmp_path: Path
) -> None:
    cfg, shards = demo_config(), source_shards(odd_set)
    write_features(odd_set, tmp_path / "whole", shards, encoder(cfg, frames=1))
    out, partial = tmp_path / "features", tmp_path / ".features.partial"
    killed = encoder(cfg, frames=1)
    members = killed.members

    def dies_in_the_second_shard(shard: Path, progress: Callable[[int], Any]) -> Iterator[tuple[str, bytes]]:
        for name, data in members(shard, progress):
            yield name, data
            if name.startswith("text"):
                raise KeyboardInterrupt

    killed.members = dies_in_the_second_shard  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        write_features(odd_set, out, shards, killed)
    assert not out.exists()
    assert [path.name for path in partial.glob("[!.]*.tar")] == ["shard-00000.tar"]
    written = (partial / "shard-00000.tar").stat()
    with pytest.raises(ValueError, match="started from another tower, sampling, dtype or data set"):
        write_features(odd_set, out, shards, encoder(cfg, dtype="bf16"))
    again = encoder(cfg, frames=1)
    write_features(odd_set, out, shards, again)
    # One video is left: the second shard has none that decodes, the third has one of four frames.
    assert again.tower.passes == [1, 1, 1, 1]
    assert (out / "shard-00000.tar").stat().st_mtime_ns == written.st_mtime_ns
    for name in shards:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_precomputed_is_refused(demo_config: MakeConfig, odd_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an Energon data set"):
        source_shards(tmp_path)
    with ShardWriter(tmp_path / "images", "train") as writer:
        writer.add("a", turns("<image>?"), [("png", b"")])
    with pytest.raises(ValueError, match="shows an image, of which no features are stored"):
        write(tmp_path / "images", tmp_path / "none", demo_config())
    write(odd_set, tmp_path / "features", demo_config())
    with pytest.raises(ValueError, match="holds features already"):
        source_shards(tmp_path / "features")
    with pytest.raises(ValueError, match="name the weights of the tower"):
        load(None, ["experiment=demo_base"])
    with pytest.raises(ValueError, match=r"model\.trainable\.vision=true"):
        load(None, ["experiment=demo", "model.trainable.vision=true"])
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="give it as --checkpoint"):
        load(None, ["experiment=demo", f"model.init_checkpoint={step}"])


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [8, 4])
def test_samples_from_features_are_those_from_videos(
    demo_config: MakeConfig, features_config: MakeConfig, frames: int
) -> None:
    # 4 of 8 frames: data sets that take 0, 2, 5 and 7, stored or decoded.
    ours = list(build_eval_loader(features_config(f"data.num_frames={frames}")))
    theirs = list(build_eval_loader(demo_config(f"data.num_frames={frames}")))
    assert len(ours) == 5
    for one, other in zip(ours, theirs, strict=True):
        assert (one.key, one.layout) == (other.key, other.layout)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert not len(one.pixel_values)
        assert one.frame_features is not None
        means = other.pixel_values.float().div(255).mean(dim=(1, 2, 3))
        torch.testing.assert_close(one.frame_features.values[:, 0, 0], means)
    questions = load_questions(features_config(f"data.num_frames={frames}"), 3)
    assert [question.sample.key for question in questions] == [sample.key for sample in ours[:3]]
    for question, sample in zip(questions, ours):
        assert torch.equal(question.sample.frame_features.values, sample.frame_features.values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_loader_over_features_goes_on_where_it_was(
    demo_config: MakeConfig, features_config: MakeConfig, workers: int
) -> None:
    cfg = features_config(f"data.num_workers={workers}")
    loader = TrainLoader(cfg, 0, 1)
    iterator = iter(loader)
    first = list(islice(iterator, 5))
    state = loader.save_state()
    expected = list(islice(iterator, 6))
    restored = TrainLoader(cfg, 0, 1)
    restored.load_state(state)
    found = list(islice(restored, 6))
    videos = islice(TrainLoader(demo_config(f"data.num_workers={workers}"), 0, 1), 11)
    for batch, again, video in zip([*first, *expected], [*first, *found], videos, strict=True):
        assert batch.keys == again.keys == video.keys
        assert torch.equal(batch.input_ids, video.input_ids)
        assert torch.equal(batch.frame_features.values, again.frame_features.values)
        assert len(batch.frame_features.values) == len(video.pixel_values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampling_that_features_lack_ends_the_job_in_one_line(
    features_config: MakeConfig, tmp_path: Path, workers: int
) -> None:
    # Stored are all 8 frames of every clip; a set that stores 3 of them lacks what 4 frames take.
    few = tmp_path / "few"
    shutil.copytree(features_config().data.train, few)
    for shard in few.glob("*.tar"):
        _keep_rows(shard, [0, 4, 7])
    cfg = features_config(f"data.train={few}", "data.num_frames=4", f"data.num_workers={workers}")
    with pytest.raises(ValueError, match=r"^sample train-\d+: 2 of the 4 frames that .* with this sampling$"):
        next(iter(TrainLoader(cfg, 0, 1)))


def _keep_rows(shard: Path, rows: list[int]) -> None:
    """Rewrites the features of a shard with fewer frames, in place and of the same size, so that its index holds."""
    from hybridprune_megatron.data.shards import write_shard

    members = []
    for key, parts in read_shard(shard):
        for part, data in parts.items():
            if part == "safetensors":
                stored = StoredFeatures(data)
                values, seconds = stored.read(FrameSampling(num_frames=8))
                smaller = features_part(values.values[rows], seconds, rows, stored.info)
                data = smaller + bytes(len(data) - len(smaller))
            members.append((f"{key}.{part}", data))
    write_shard(shard, members)


def test_features_of_another_model_are_refused(features_config: MakeConfig, tmp_path: Path) -> None:
    shutil.copytree(features_config().data.train, tmp_path / "train")
    cfg = features_config(f"data.train={tmp_path / 'train'}")
    check_data_sets(cfg)
    cfg.reduction.front = FRONTS.build({"name": "evs_pixels", "retention": 0.5})
    with pytest.raises(
        ConfigError, match=r"reduction\.front=evs_pixels: compares frames, and data\.train=.* holds features"
    ):
        check_data_sets(cfg)
    cfg.reduction.front = FRONTS.build("none")
    cfg.model.trainable.vision = True
    with pytest.raises(ConfigError, match=r"model\.trainable\.vision=true: data\.train=.* features of a frozen tower"):
        check_data_sets(cfg)
    with pytest.raises(ValueError, match=r"^sample train-\d+: model\.trainable\.vision=true: .* train on videos$"):
        next(iter(TrainLoader(cfg, 0, 1)))
    cfg.model.trainable.vision = False
    cfg.model.vision.frame_size = 64
    with pytest.raises(ConfigError, match=r"features with model\.vision\.frame_size=128, configured is 64; precompute"):
        check_data_sets(cfg)
    (Path(cfg.data.train) / FEATURES_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"features\.json cannot be read \(expected an object with tower"):
        check_data_sets(cfg)


def test_a_batch_holds_frames_or_features_of_one_tower(features_config: MakeConfig, demo_config: MakeConfig) -> None:
    from dataclasses import replace

    (stored, *_), (video, *_) = build_eval_loader(features_config()), build_eval_loader(demo_config())
    other = replace(stored, frame_features=FrameFeatures(stored.frame_features.values, "another"))
    text = replace(video, pixel_values=no_pixels())
    assert pack([stored]).frame_features.values.data_ptr() == stored.frame_features.values.data_ptr()
    assert len(pack([stored, text, stored]).frame_features.values) == 8
    with pytest.raises(ValueError, match="show frames and features in one batch"):
        pack([stored, video])
    with pytest.raises(ValueError, match=r"features of towers another, [0-9a-f]{16} in one batch"):
        pack([stored, other])
