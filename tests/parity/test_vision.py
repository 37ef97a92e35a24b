"""The video model of a published folder: tower features, and logits, against transformers' parts put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.ours import config_of, model_of
from tests.parity.twins import language_model, radio_twin, write_vision_twin
from tests.worlds import run_world

FEATURES = 1e-4
LOGITS = 2e-4


def _batch(image_token: int) -> Any:
    """Two samples of odd length, one with three frames, one with two."""
    from hybridprune_megatron.data.batch import EncodedSample, pack
    from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

    generator = torch.Generator().manual_seed(4)
    samples = []
    for number, frames in enumerate((3, 2)):
        spans = [Span(TokenKind.TEXT, 4 + number)]
        for frame in range(frames):
            spans += [Span(TokenKind.TEXT, 2), Span(TokenKind.FRAME, 4, 0, frame)]
        spans += [Span(TokenKind.QUESTION, 5), Span(TokenKind.TEXT, 3)]
        layout = SampleLayout(tuple(spans))
        ids = torch.randint(0, image_token, (layout.num_tokens,), generator=generator)
        ids[torch.tensor(layout.kinds()) == TokenKind.FRAME] = image_token
        pixels = torch.randint(0, 256, (frames, 3, 32, 32), dtype=torch.uint8, generator=generator)
        samples.append(EncodedSample(f"clip-{number}", ids, torch.full_like(ids, -100), layout, pixels))
    return pack(samples)


def _ours(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tower features of all frames and logits of all tokens."""
    model: Any = model_of(config_of(folder))
    batch = _batch(95)
    with torch.no_grad():
        features = model.vision_model(batch.pixel_values.float() / 255).features
        logits, _ = model.logits(batch)
    return features.numpy(), logits.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "hf"
    write_vision_twin(path, dtype=torch.float32)
    return path


def _theirs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from transformers' RADIO and Nemotron-H, shuffled and projected as the published code does."""
    from safetensors.torch import load_file

    tower, language = radio_twin(), language_model("12b")
    projector: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        projector |= {name: value for name, value in load_file(file).items() if name.startswith("mlp1.")}
    batch = _batch(95)
    logits, start, frame = [], 0, 0
    with torch.no_grad():
        features = tower(batch.pixel_values.float() / 255).features
        grid = features.unflatten(1, (4, 4))
        # Pixel shuffle "v2": blocks of 2 x 2 patches side by side in a row, rows in order.
        blocks = grid.reshape(len(grid), 4, 2, -1).permute(0, 2, 1, 3).reshape(len(grid), 2, 2, -1).permute(0, 2, 1, 3)
        tokens = blocks.flatten(1, 2)
        normed = torch.nn.functional.rms_norm(tokens, tokens.shape[-1:], projector["mlp1.0.weight"], 1e-5)
        inner = torch.relu(normed @ projector["mlp1.1.weight"].T).square()
        visual = inner @ projector["mlp1.3.weight"].T
        for layout in batch.layouts:
            ids = batch.input_ids[start : start + layout.num_tokens]
            frames = int((ids == 95).sum()) // 4
            embedded = language.model.embeddings(ids)
            embedded[ids == 95] = visual[frame : frame + frames].flatten(0, 1)
            logits.append(language(inputs_embeds=embedded.unsqueeze(0)).logits[0])
            start, frame = start + layout.num_tokens, frame + frames
    return features, torch.cat(logits)


def test_features_and_logits(folder: Path) -> None:
    features, logits = run_world(1, _ours, folder)[0]
    wanted_features, wanted_logits = _theirs(folder)
    assert wanted_features.std() > 0.1
    assert (torch.from_numpy(features) - wanted_features).abs().max() < FEATURES
    assert (torch.from_numpy(logits) - wanted_logits).abs().max() < LOGITS


def test_transformers_reads_the_towers_names_as_we_do(folder: Path, tmp_path: Path) -> None:
    """The twin's names come from our table; transformers has a mapping of its own for them."""
    from safetensors.torch import load_file, save_file
    from transformers import RadioModel

    tower: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tower |= {name: value for name, value in load_file(file).items() if name.startswith("vision_model.")}
    radio_twin().config.save_pretrained(tmp_path)
    own = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    save_file(own, tmp_path / "model.safetensors")
    read, loading = RadioModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert all("layer_scale" in name for name in loading["missing_keys"])
    frames = _batch(95).pixel_values.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(frames).features, radio_twin()(frames).features)


def _split_loss(folder: Path) -> np.ndarray:
    """Losses of a packed sequence, from a model that is split over the processes of the world."""
    import torch.distributed as dist

    from tests.parity.ours import text_batch

    size = dist.get_world_size()
    split = f"parallel.tensor={size}", f"parallel.sequence_parallel={size > 1}", f"trainer.devices={size}"
    cfg = config_of(folder, *split)
    with torch.no_grad():
        return model_of(cfg)(text_batch([36, 28], 90)).numpy()


def test_a_folder_is_read_straight_into_a_split_model(folder: Path) -> None:
    whole = run_world(1, _split_loss, folder)[0]
    for part in run_world(2, _split_loss, folder):
        np.testing.assert_allclose(part, whole, rtol=1e-5)


def _stage(folder: Path) -> dict[str, np.ndarray]:
    """The weights of this pipeline stage by their names in the whole."""
    from dataclasses import replace

    from hybridprune_megatron.engine.weights import whole_weights

    cfg = config_of(folder)
    cut = replace(cfg.model, hybrid_pattern="M-M-M-|M*-M-")
    cfg = replace(
        cfg,
        model=cut,
        parallel=replace(cfg.parallel, pipeline=2),
        trainer=replace(cfg.trainer, devices=2),
    )
    return {name: value.detach().numpy().copy() for name, value in whole_weights(model_of(cfg)).items()}


def test_every_pipeline_stage_reads_its_layers(folder: Path) -> None:
    from hybridprune_megatron.huggingface.source import open_weights

    weights: Any = open_weights(folder)
    first, last = run_world(2, _stage, folder)
    assert "language_model.decoder.layers.5.mlp.linear_fc1.weight" in first
    assert "language_model.decoder.layers.7.self_attention.linear_qkv.weight" in last
    read = first | last
    for name in weights.names:
        np.testing.assert_array_equal(read[name], weights.read(name).numpy(), err_msg=name)
