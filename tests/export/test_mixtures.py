"""Images in tiles, videos, texts and all in one conversation: trained packed as one by one, and asked the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybridprune_megatron.data.batch import pack
from hybridprune_megatron.data.conversation import read_conversation, render_chat
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.evaluation.answering import AnsweringModel
from hybridprune_megatron.evaluation.decoding import exported_model
from hybridprune_megatron.evaluation.forward import measuring
from hybridprune_megatron.evaluation.judging import reduction_at
from hybridprune_megatron.export.write import processor_settings
from tests.export.conftest import BUDGET, NUM_FRAMES

#: What is asked, and of which media: i and j images, v and w videos.
ASKED = {
    "images": ("<image>\nWhat is it?", "i"),
    "two images": ("<image> or <image>?", "ij"),
    "text": ("Who are you?", ""),
    "video": ("<video>\nWhen?", "v"),
    "all": ("<image>\n<video>\nWhich of both? <image>", "jwi"),
}


@pytest.fixture(scope="module")
def media(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (width, height) in {"i": (90, 60), "j": (31, 64)}.items():
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return {"i": folder / "i.png", "j": folder / "j.png", "v": clips[0], "w": clips[1]}


@pytest.fixture(scope="module")
def encoder(world: SimpleNamespace) -> SampleEncoder:
    return SampleEncoder(_tiled(world))


def _tiled(world: SimpleNamespace) -> Any:
    return replace(world.cfg, data=replace(world.cfg.data, max_tiles=6))


def _stored(paths: list[Path]) -> list[Any]:
    return [StoredImage(path.read_bytes()) if path.suffix == ".png" else path.read_bytes() for path in paths]


@pytest.mark.parametrize("budget", [1.0, BUDGET])
def test_losses_of_a_pack_are_those_of_its_samples(
    world: SimpleNamespace, encoder: SampleEncoder, media: dict[str, Path], budget: float
) -> None:
    samples = []
    for key, (question, shown) in ASKED.items():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"A {key}."}]
        samples += encoder.encode(key, messages, _stored([media[each] for each in shown]))
    # Three by two tiles with a thumbnail, one by two with one; five frames are all of the first video.
    assert [len(sample.pixel_values) for sample in samples] == [7, 7 + 3, 0, 5, 3 + NUM_FRAMES + 7]
    with measuring(world.model, reduction_at(_tiled(world), budget)), torch.no_grad():
        alone = torch.cat([world.model(pack([sample])) for sample in samples])
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
            packed = world.model(pack([samples[number] for number in order]))
            counts = [int((sample.labels != -100).sum()) for sample in samples]
            parts = alone.split(counts)
            wanted = torch.cat([parts[number] for number in order])
            torch.testing.assert_close(packed, wanted, rtol=1e-5, atol=1e-5)


def test_an_export_is_asked_about_each(
    world: SimpleNamespace, encoder: SampleEncoder, media: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes is what the checkpoint writes, about the same tiles."""
    assert processor_settings(_tiled(world))["max_tiles"] == 6
    monkeypatch.setattr(world.processor, "max_tiles", 6)
    language = exported_model(world.model, world.cfg)
    model = AnsweringModel(language, world.model.vision_model, world.model.mlp1, world.model.pixel_shuffle)
    for key, (question, shown) in ASKED.items():
        conversation = read_conversation([{"role": "user", "content": question}], ("video", "image"))
        paths = [media[each] for each in shown]
        prompt = encoder.prompt(key, conversation, _stored(paths))
        inputs = world.processor(
            text=[render_chat(conversation)],
            images=[str(path) for path in paths if path.suffix == ".png"],
            videos=[str(path) for path in paths if path.suffix == ".mp4"],
        )
        assert prompt.input_ids.tolist() == inputs["input_ids"][0].tolist(), key
        written = world.hf.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(prompt.input_ids) :].tolist()
        end = world.hf.config.eos_token_id
        filled = model.prefilled(*model.embedded([prompt]), reduction_at(world.cfg))
        assert model.written(filled, end, 8) == [written[: written.index(end)] if end in written else written], key
