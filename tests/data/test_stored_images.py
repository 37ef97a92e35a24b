"""Images in training: from rows to shards to batches, alone and mixed with videos and text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybridprune_megatron.commands.shards import main as shards
from hybridprune_megatron.data.images import read_image, to_square
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.data.stored_samples import StoredSample, read_samples
from hybridprune_megatron.data.task_encoder import TrainLoader
from hybridprune_megatron.method.layout import TokenKind
from tests.data.conftest import encode_clip, grey_frames
from tests.hostile.folders import config, tar_names


def picture(seed: int, file_format: str = "PNG", height: int = 40, width: int = 60) -> bytes:
    """An image file of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, file_format)
    return buffer.getvalue()


def said(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "dark"}]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.png").write_bytes(picture(0))
    (folder / "b.JPG").write_bytes(picture(1, "JPEG", 33, 20))
    (folder / "grey.mp4").write_bytes(encode_clip(grey_frames(3), range(0, 120, 40)))
    (folder / "cut.png").write_bytes(picture(0)[:-400])
    (folder / "thin.png").write_bytes(picture(0, height=4))
    (folder / "video.png").write_bytes((folder / "grey.mp4").read_bytes())
    (folder / "text.jpg").write_text("no image")
    return folder


ROWS: list[dict[str, Any]] = [
    {"id": "image", "image": "a.png", "messages": said("<image>\nWhich?")},
    {"id": "two", "images": ["a.png", "b.JPG"], "messages": [*said("<image> or?"), *said("And <image>?")]},
    {"id": "both", "image": "b.JPG", "video": "grey.mp4", "messages": said("<video>\n<image>\nWhich?")},
    {"id": "video", "video": "grey.mp4", "messages": said("<video>\nWhich?")},
    {"id": "stands", "video": "grey.mp4", "messages": said("<image>\nWhich?")},
    {"id": "text", "messages": said("Which?")},
]


@pytest.fixture(scope="module")
def folder(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of ``ROWS``; rows of images that cannot be read are left out."""
    out = tmp_path_factory.mktemp("images") / "set"
    bad = [{"image": name, "messages": said("<image>?")} for name in ("cut.png", "thin.png", "video.png", "text.jpg")]
    (media / "rows.json").write_text(json.dumps([*ROWS, *bad]))
    shards(f"--conversations {media}/rows.json --videos {media} --out {out} --workers 2".split())
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {"video": 4}
    assert report["samples"] == len(ROWS)
    return out


def test_images_are_parts_of_samples(folder: Path, media: Path) -> None:
    parts = [name for name in tar_names(folder) if not name.endswith(".json")]
    assert parts == ["image.png", "two.0.png", "two.1.jpg", "both.0.mp4", "both.1.jpg", "video.mp4", "stands.mp4"]
    samples = {sample.key: sample for sample in read_samples(folder)}
    assert samples["image"].videos == (StoredImage((media / "a.png").read_bytes()),)
    assert samples["both"].videos == ((media / "grey.mp4").read_bytes(), StoredImage((media / "b.JPG").read_bytes()))


def test_an_image_is_a_frame_without_a_time(folder: Path, media: Path) -> None:
    encoder = SampleEncoder(config(folder, "data.sampling=uniform", "data.num_frames=3"))
    tokens = encoder.prompts.tokens_per_frame
    samples = {sample.key: sample for sample in read_samples(folder)}
    for key, shown in (("image", [(0, 0)]), ("two", [(0, 0), (1, 0)]), ("both", [(0, 0), (0, 1), (0, 2), (1, 0)])):
        (encoded,) = encoder.encode(key, samples[key].messages, samples[key].videos)
        frames = [span for span in encoded.layout.spans if span.kind == TokenKind.FRAME]
        assert [(span.video, span.frame) for span in frames] == shown
        assert {span.num_tokens for span in frames} == {tokens}
        assert encoded.layout.count(TokenKind.QUESTION) > 0
        text = encoder.tokenizer.decode(encoded.input_ids)
        assert text.count("sampled at") == sum(video == 0 for video, _ in shown) * (key == "both")
        last = encoded.pixel_values[-1]
        name = "a.png" if key == "image" else "b.JPG"
        assert torch.equal(last, to_square(read_image(media / name), encoder.frame_size))


def test_each_turn_shows_the_images_up_to_it(folder: Path) -> None:
    encoder = SampleEncoder(config(folder, "data.conversation=split_turns"))
    (sample,) = [sample for sample in read_samples(folder) if sample.key == "two"]
    first, second = encoder.encode("two", sample.messages, sample.videos)
    assert [len(each.pixel_values) for each in (first, second)] == [1, 2]
    assert torch.equal(first.pixel_values, second.pixel_values[:1])


@pytest.mark.parametrize(
    ("question", "parts", "reason", "words"),
    [
        ("<image>?", {"png": b"no image"}, "video", "image 0 cannot be read"),
        ("<image>?", {"png": b""}, "video", "empty"),
        ("<image>?", {"mp4": b"x"}, "malformed", "reserved"),
        ("<video>?", {"png": picture(0)}, "malformed", "placeholder 1 is <video>, and the type of its file an image's"),
        ("<image><image>?", {"png": picture(0)}, "malformed", "2 placeholders of videos and images but 1"),
        ("<image>", {"png": picture(0)}, "malformed", "its question has no text"),
    ],
)
def test_what_does_not_fit_is_a_bad_sample(question: str, parts: dict[str, bytes], reason: str, words: str) -> None:
    encoder = SampleEncoder(config(Path("none")))
    content = json.dumps({"conversation": said(question)}).encode()

    def read() -> None:
        stored = StoredSample.of("k", {"json": content, **parts}, Path("none"))
        encoder.encode("k", stored.messages, stored.videos)

    with pytest.raises(ValueError, match=words) as caught:
        read()
    assert reason == getattr(caught.value, "reason", "malformed")


def test_images_videos_and_text_are_trained_on_together(folder: Path) -> None:
    loader, keys = TrainLoader(config(folder, "data.sequence_length=512"), 0, 1), set()
    mixed = False
    for _, batch in zip(range(40), loader):
        mixed |= {"image", "text"} <= {*batch.keys} or {"image", "video"} <= {*batch.keys}
        keys.update(key for key in batch.keys if key)
        if len(keys) == len(ROWS) and mixed:
            break
    assert keys == {row["id"] for row in ROWS}
    assert mixed
    assert set(loader.counts) == {"seen"}
