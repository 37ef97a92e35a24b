"""A checkpoint and an export answer alike, as transformers' ``generate`` answers, and know how likely a text is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybridprune_megatron.config.features import FeaturesInfo
from hybridprune_megatron.config.stored_export import export_config, is_export
from hybridprune_megatron.data.batch import EncodedSample, pack
from hybridprune_megatron.data.conversation import read_conversation, render_chat
from hybridprune_megatron.data.features import StoredFeatures, features_part
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.evaluation.answering import AnsweringModel
from hybridprune_megatron.evaluation.decoding import exported_model
from hybridprune_megatron.evaluation.forward import measuring
from hybridprune_megatron.evaluation.judging import reduction_at
from hybridprune_megatron.export.read import load_export
from hybridprune_megatron.models.encoder import frame_tokens
from hybridprune_megatron.models.video_language_model import tower_fingerprint
from tests.export.conftest import BUDGET, QUESTIONS

BUDGETS = (1.0, BUDGET, 0.3)
TEXTS = ("A cat.", "no", "7")


@pytest.fixture(scope="module")
def encoder(world: SimpleNamespace) -> SampleEncoder:
    return SampleEncoder(world.cfg)


@pytest.fixture(scope="module")
def prompts(encoder: SampleEncoder, clips: list[Path]) -> list[EncodedSample]:
    return [
        encoder.prompt(question, read_conversation(asked(question)), [clip.read_bytes()])
        for question, clip in zip(QUESTIONS, clips)
    ]


@pytest.fixture(scope="module")
def model(world: SimpleNamespace) -> AnsweringModel:
    """The checkpoint's."""
    language = exported_model(world.model, world.cfg)
    return AnsweringModel(language, world.model.vision_model, world.model.mlp1, world.model.pixel_shuffle)


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"<video>\n{question}"}]


def test_a_prompt_is_a_training_sample_up_to_its_answer(encoder: SampleEncoder, clips: list[Path]) -> None:
    messages = [*asked("What?"), {"role": "assistant", "content": "A cat."}]
    (sample,) = encoder.encode("one", messages, [clips[0].read_bytes()])
    prompt = encoder.prompt("one", read_conversation(messages[:1]), [clips[0].read_bytes()])
    said = encoder.answer_ids("one", "A cat.")
    assert sample.input_ids.tolist() == [*prompt.input_ids.tolist(), *said]
    assert sample.labels[sample.labels != -100].tolist() == list(said)
    assert (prompt.labels == -100).all()
    assert torch.equal(prompt.pixel_values, sample.pixel_values)
    assert sample.layout.spans[:-1] == prompt.layout.spans
    assert said[-1] == encoder.end_id
    for content in ("<video>", "<video>\n", "What?"):
        with pytest.raises(BadSampleError):
            encoder.prompt("two", read_conversation([{"role": "user", "content": content}]), [clips[0].read_bytes()])
    with pytest.raises(BadSampleError, match="reserved for the prompt format"):
        encoder.answer_ids("two", "<image>")
    with pytest.raises(BadSampleError, match=r"data\.sequence_length=512"):
        encoder.answer_ids("two", "x" * 600)


def test_images_are_shown_as_the_processor_shows_them(
    world: SimpleNamespace, encoder: SampleEncoder, clips: list[Path], tmp_path: Path
) -> None:
    """What is trained on images is what an export is asked about them."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    image = StoredImage((tmp_path / "a.png").read_bytes())
    content = "<image>\nWhat is it?", "<video> or <image>?"
    media: list[list[Any]] = [[image], [clips[0].read_bytes(), image]]
    for question, shown, videos in zip(content, media, ([], [str(clips[0])])):
        conversation = read_conversation([{"role": "user", "content": question}], ("video", "image"))
        prompt = encoder.prompt("one", conversation, shown)
        given = world.processor(text=[render_chat(conversation)], images=[str(tmp_path / "a.png")], videos=videos)
        assert prompt.input_ids.tolist() == given["input_ids"][0].tolist()
        assert torch.equal(prompt.pixel_values, given["pixel_values"])
        assert prompt.layout.kinds() == given["token_kinds"][0].tolist()


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_answers_are_those_of_generate(
    world: SimpleNamespace, model: AnsweringModel, prompts: list[EncodedSample], inputs: dict, budget: float
) -> None:
    end, own = world.hf.config.eos_token_id, dict(world.hf.config.reduction)
    world.hf.set_reduction(None if budget == 1 else {"budget": budget})
    try:
        wanted = world.hf.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    finally:
        world.hf.set_reduction(own)
    batch, hidden = model.embedded(prompts)
    filled = model.prefilled(batch, hidden, reduction_at(world.cfg, budget))
    written = model.written(filled, end, 12)
    assert written == [row[: row.index(end)] if end in row else row for row in wanted.tolist()]
    assert all(written)
    # Neither what others are asked, nor what was asked before, changes an answer.
    assert model.written(filled, end, 12) == written
    assert model.written(filled.rows([2, 0]), end, 12) == [written[2], written[0]]
    # An answer ends at its end, and nothing is written after it.
    stop = written[1][3]
    cut = model.written(filled, stop, 12)
    assert cut == [row[: row.index(stop)] if stop in row else row for row in written]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_text_is_as_likely_as_in_one_pass_over_it(
    world: SimpleNamespace,
    model: AnsweringModel,
    encoder: SampleEncoder,
    prompts: list,
    clips: list[Path],
    budget: float,
) -> None:
    reduction = reduction_at(world.cfg, budget)
    batch, hidden = model.embedded(prompts)
    filled = model.prefilled(batch, hidden, reduction)
    ids = [encoder.answer_ids("", text) for text in TEXTS]
    found = model.likelihoods(filled, ids)
    for index, text in enumerate(TEXTS):
        messages = [*asked(QUESTIONS[index]), {"role": "assistant", "content": text}]
        (sample,) = encoder.encode("one", messages, [clips[index].read_bytes()])
        with measuring(world.model, reduction), torch.no_grad():
            losses, right = world.model(pack([sample]), judged=True)
        assert found[index].loss == pytest.approx(float(losses.sum()), rel=1e-4)
        assert found[index].tokens == len(losses) == len(ids[index])
        assert found[index].exact == bool(right.all())
    # What greedy decoding writes, with its end wherever that is, is exact; with another last token it is not.
    written = model.written(filled, encoder.end_id, 4)
    assert [each.exact for each in model.likelihoods(filled, written)] == [True] * 3
    spoiled = [[*row[:-1], (row[-1] + 1) % 200] for row in written]
    assert [each.exact for each in model.likelihoods(filled, spoiled)] == [False] * 3
    # The likeliest of some choices, whose numbers differ.
    choices = [ids, ids[1:], []]
    losses = [
        [model.likelihoods(filled.rows([row]), [each])[0].loss for each in own] for row, own in enumerate(choices)
    ]
    assert model.likeliest(filled, choices) == [losses[0].index(min(losses[0])), losses[1].index(min(losses[1])), None]


def test_an_export_is_read_back_without_its_code(
    world: SimpleNamespace, model: AnsweringModel, prompts: list[EncodedSample], tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(world.folder, folder)
    for code in folder.glob("*.py"):
        code.write_text("raise SystemExit('the folder is run')\n")
    assert is_export(folder)
    cfg = export_config(folder, [])
    assert cfg.reduction == world.cfg.reduction
    assert cfg.retention_by_layer == world.cfg.retention_by_layer
    assert cfg.model.vision == world.cfg.model.vision
    for name in ("hybrid_pattern", "kv_channels", "mamba_num_groups", "tie_embeddings", "time_step_min"):
        assert getattr(cfg.model, name) == getattr(world.cfg.model, name), name
    for name in ("sampling", "num_frames", "frame_text", "conversation"):
        assert getattr(cfg.data, name) == getattr(world.cfg.data, name), name
    read = AnsweringModel.load(folder, cfg, is_export=True)
    answers = []
    for each, settings in ((read, cfg), (model, world.cfg)):
        batch, hidden = each.embedded(prompts)
        filled = each.prefilled(batch, hidden, reduction_at(settings, BUDGET))
        answers.append((filled.logits, each.written(filled, world.hf.config.eos_token_id, 8), filled.shares))
    assert torch.allclose(answers[0][0], answers[1][0], atol=1e-5)
    assert answers[0][1:] == answers[1][1:]
    assert export_config(folder, ["reduction.budget=0.7"]).reduction.budget == 0.7


def test_what_an_export_computes_counts_however_it_was_solved(world: SimpleNamespace, tmp_path: Path) -> None:
    settings = json.loads((world.folder / "config.json").read_text())
    # Another schedule of the same mean.
    stored = [1.0, 0.75, 0.25, 0.25, 0.25]
    settings["reduction"]["retention"] = stored
    shutil.copytree(world.folder, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    assert list(export_config(tmp_path / "hf", []).retention_by_layer) == stored
    assert list(export_config(tmp_path / "hf", ["reduction.budget=0.5"]).retention_by_layer) != stored


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda content: content.pop("hidden_size"), "hidden_size"),
        ("config.json", lambda content: content.update(hidden_size="wide"), "hidden_size"),
        ("config.json", lambda content: content.update(time_step_limit=[]), "IndexError"),
        ("config.json", lambda content: content["reduction"].update(score="os.path.join"), "os.path.join"),
        ("processor_config.json", lambda content: content.pop("sampling"), "sampling"),
        ("processor_config.json", lambda content: content.update(num_frames=-1), "num_frames"),
    ],
)
def test_a_broken_export_is_one_line(world: SimpleNamespace, tmp_path: Path, name: str, change, words: str) -> None:
    shutil.copytree(world.folder, tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / name).read_text())
    change(content)
    (tmp_path / "hf" / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        export_config(tmp_path / "hf", [])
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "hf") in str(caught.value)


def test_only_files_of_the_folder_are_read(world: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"one": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file '\.\./other\.safetensors'"):
        export_config(tmp_path / "hf", [])
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ValueError, match="has no weight_map"):
        export_config(tmp_path / "hf", [])
    index.unlink()
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "hf" / "processor_config.json").unlink()
    (tmp_path / "hf" / "processor_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside of the folder"):
        export_config(tmp_path / "hf", [])


def test_weights_that_lack_one_are_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    del index["weight_map"]["language_model.lm_head.weight"]
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lm_head\.weight") as caught:
        load_export(tmp_path / "hf")
    assert "\n" not in str(caught.value)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cannot be read as an export"):
        load_export(tmp_path / "hf")
    assert not is_export(tmp_path)


def test_features_stand_for_their_frames(
    world: SimpleNamespace, model: AnsweringModel, encoder: SampleEncoder, prompts: list[EncodedSample]
) -> None:
    tower, vision = world.model.vision_model, world.cfg.model.vision
    with torch.no_grad():
        values = frame_tokens(tower, prompts[0].pixel_values, vision.pixel_shuffle, False)
    for name, fits in ((tower_fingerprint(tower), True), ("another", False)):
        info = FeaturesInfo(name, vision.frame_size, values.shape[1], values.shape[2], "data.sampling=uniform", "fp32")
        count = len(values)
        # The clip has five frames, at 5 frames a second.
        stored = StoredFeatures(features_part(values, [index / 5 for index in range(count)], range(count), info))
        prompt = encoder.prompt("one", read_conversation(asked(QUESTIONS[0])), [stored])
        if fits:
            (_, wanted), (_, found) = model.embedded(prompts[:1]), model.embedded([prompt])
            assert torch.allclose(found, wanted, atol=1e-6)
        else:
            with pytest.raises(ValueError, match="features of tower another"):
                model.embedded([prompt])
