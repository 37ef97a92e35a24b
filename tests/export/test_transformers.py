"""What users of transformers do with a model: streams, dtypes, devices, compilation."""

from __future__ import annotations

import json
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, TextIteratorStreamer, TextStreamer, pipeline

from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
from tests.export.conftest import message, row

SETTINGS = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture(scope="module")
def answers(world, inputs) -> torch.Tensor:
    """Greedy tokens of the model as it is."""
    return world.hf.generate(**inputs, **SETTINGS)


def load(world, **settings):
    """The export, loaded again."""
    return AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, **settings).eval()


def test_streams(world, inputs, answers, capsys) -> None:
    tokenizer = world.processor.tokenizer
    text = tokenizer.decode(answers[1, -6:])
    capsys.readouterr()
    single = row(inputs, 1)
    world.hf.generate(**single, **SETTINGS, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=world.hf.generate, kwargs={**single, **SETTINGS, "streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == text
    assert len(parts) > 1


@pytest.mark.parametrize(("task", "kind"), [("any-to-any", "video"), ("image-text-to-text", "image")])
def test_a_pipeline_answers_as_the_model_does(world, clips, tmp_path, task: str, kind: str) -> None:
    shown = clips[0]
    if kind == "image":
        shown = tmp_path / "image.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(shown)
    chat = message("What?")
    chat[0]["content"][0] = {"type": kind, "path": str(shown)}
    inputs = world.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    alone = world.hf.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    answer = pipeline(task, model=str(world.folder), trust_remote_code=True)
    (found,) = answer(text=chat, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert found["generated_text"] == world.processor.tokenizer.decode(alone, skip_special_tokens=True) != ""


def test_bf16_is_fp32_but_for_rounding(world, inputs) -> None:
    model = load(world, dtype=torch.bfloat16, reduction=None)
    with torch.no_grad():
        exact, rounded = load(world, reduction=None)(**inputs).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert rounded.dtype == torch.bfloat16
    # Eight bits a number: 2^-8 of it, added up over five layers.
    error = (rounded[real].float() - exact[real]).square().mean().sqrt() / exact[real].std()
    assert 1e-4 < error < 0.03
    model.set_reduction(world.hf.config.reduction)
    out = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    assert all(logits.isfinite().all() for logits in out.logits)
    assert out.past_key_values.layers[0].state.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", "layers on disk"])
def test_device_maps(world, inputs, answers, device_map: str, tmp_path) -> None:
    settings = {}
    if device_map == "layers on disk":
        modules = {"language_model.backbone.embeddings", "language_model.backbone.norm_f", "language_model.lm_head"}
        modules |= {"vision_model", "mlp1"} | {f"language_model.backbone.layers.{index}" for index in range(5)}
        # A Mamba, an attention and an MLP layer: their weights are there during their forward only.
        offloaded = {f"language_model.backbone.layers.{index}" for index in (1, 2, 3)}
        settings["offload_folder"] = str(tmp_path)
        device_map = {name: "disk" if name in offloaded else "cpu" for name in modules}
    model = load(world, device_map=device_map, **settings)
    if settings:
        assert model.language_model.backbone.layers[3].mixer.A_log.is_meta
    assert torch.equal(model.generate(**inputs, **SETTINGS), answers)


def test_attributes_that_loading_reads(world, inputs, answers) -> None:
    model = load(world, low_cpu_mem_usage=True)
    assert torch.equal(model.generate(**inputs, **SETTINGS), answers)
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    names = [name for name, _ in model.named_parameters()]
    for part in ("A_log", "mixer.D"):
        assert sum(part in name for name in names) == model.config.hybrid_override_pattern.count("M")


def test_what_stays_in_fp32(world, tmp_path) -> None:
    """A rounded correction bias would choose other experts."""
    experts = {"num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 8, "shared_ffn_hidden_size": 8}
    rest = {"latent_size": None, "routed_scaling": 1.0, "num_groups": 1, "groups_per_token": 1}
    settings = {**world.hf.config.to_dict(), "hybrid_override_pattern": "ME*", "reduction": None}
    HybridPruneForCausalLM(HybridPruneConfig.from_dict({**settings, "experts": experts | rest})).save_pretrained(
        tmp_path
    )
    model = HybridPruneForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    layers = "language_model.backbone.layers"
    assert {f"{layers}.0.mixer.A_log", f"{layers}.0.mixer.D", f"{layers}.1.mixer.gate.e_score_correction_bias"} <= exact
    assert not any(name.endswith("weight") for name in exact)


def test_compiled_forward(world, inputs) -> None:
    torch.manual_seed(0)
    settings = {**world.hf.config.to_dict(), "hybrid_override_pattern": "M*", "reduction": {"budget": 0.6}}
    model = HybridPruneForCausalLM(HybridPruneConfig.from_dict(settings)).eval()
    single = row(inputs, 0)
    # Training on a CPU turns torch.compile off for its process.
    with torch.no_grad(), torch.compiler.set_stance("default"):
        wanted = model(**single)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model.forward, backend="aot_eager")
        found = compiled(**single)
        assert torch.equal(found.logits.isnan(), wanted.logits.isnan())
        assert (found.logits - wanted.logits).nan_to_num().abs().max() < 1e-5
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        # Decoding too, each over its own caches.
        token = torch.tensor([[7]])
        wanted = model(input_ids=token, past_key_values=wanted.past_key_values)
        found = compiled(input_ids=token, past_key_values=found.past_key_values)
        assert (found.logits - wanted.logits).abs().max() < 1e-5
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


def test_a_saved_copy_is_whole(world, tmp_path) -> None:
    world.hf.save_pretrained(tmp_path)
    world.processor.save_pretrained(tmp_path)
    for code in world.folder.glob("*.py"):
        assert (tmp_path / code.name).read_bytes() == code.read_bytes(), code.name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (world.folder, tmp_path))
    assert {name: path.split("--")[-1] for name, path in after["auto_map"].items()} == before["auto_map"]
    assert {name: after[name] for name in before if name != "auto_map"} == {
        name: value for name, value in before.items() if name != "auto_map"
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    state, copied = world.hf.state_dict(), again.state_dict()
    assert set(state) == set(copied)
    assert all(torch.equal(state[name], copied[name]) for name in state)
    kept = ("eos_token_id", "pad_token_id", "do_sample")
    assert all(getattr(again.generation_config, name) == getattr(world.hf.generation_config, name) for name in kept)
