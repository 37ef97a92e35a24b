"""The exported folder: self-contained, complete, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from hybridprune_megatron.export.convert import NameMap
from hybridprune_megatron.export.write import export_model

ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hybridprune_megatron", "megatron", "nemo", "lightning"):
            raise ModuleNotFoundError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, clip, checkout = sys.argv[1:]
assert checkout not in sys.path
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, videos=[clip], return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
"""


def test_the_export_answers_without_this_package(world, clips, tmp_path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    checkout = str(Path(__file__).resolve().parents[2])
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(script), str(world.folder), str(clips[0]), checkout]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    text = "<SPECIAL_11>User\n<video>What is it?\n<SPECIAL_11>Assistant\n"
    inputs = world.processor(text=text, videos=[str(clips[0])])
    here = world.hf.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert json.loads(done.stdout.strip().splitlines()[-1]) == here


def test_no_import_of_the_package_or_of_megatron_is_left(world) -> None:
    files = sorted(world.folder.glob("*.py"))
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import)\s+(hybridprune_megatron|megatron|nemo|lightning)\b", text, re.M), path


def test_auto_classes(world) -> None:
    config = AutoConfig.from_pretrained(world.folder, trust_remote_code=True)
    assert config.reduction["budget"] == 0.5
    assert config.time_step_limit == [0.0, "inf"]
    model = AutoModel.from_pretrained(world.folder, trust_remote_code=True)
    assert type(model).__name__ == "HybridPruneForCausalLM"
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(world.folder, trust_remote_code=True)
    assert tokenizer.encode("<image>", add_special_tokens=False) == [config.image_token_id]
    assert json.loads((world.folder / "generation_config.json").read_text())["eos_token_id"] == config.eos_token_id


def test_reduction_as_an_argument(world, inputs) -> None:
    def loaded(**settings):
        return AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, **settings).eval()

    full = loaded(reduction=None)
    assert full.config.reduction is None
    with torch.no_grad():
        out = full(**inputs, output_reduction=True)
    assert {len(layer[1]) for layer in out.reduction_trace} == {4 * 7}
    assert not out.logits[inputs["attention_mask"].bool()].isnan().any()
    less = loaded(reduction={"budget": 0.4})
    assert less.config.reduction["scorer"] == "query"
    assert sum(less.config.reduction["retention"]) / 5 == pytest.approx(0.4)
    with pytest.raises(ValueError, match="allowed are scorer, budget"):
        loaded(reduction={"budgt": 0.4})


def test_save_and_load_again(world, inputs, tmp_path) -> None:
    world.hf.save_pretrained(tmp_path / "again")
    world.processor.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    # save_pretrained adds the auto_map to the processor that it saves.
    settings = [{**each.to_dict(), "auto_map": None} for each in (processor, world.processor)]
    assert settings[0] == settings[1]
    assert again.config.reduction == world.hf.config.reduction
    with torch.no_grad():
        assert torch.equal(again(**inputs, logits_to_keep=1).logits, world.hf(**inputs, logits_to_keep=1).logits)


def test_bf16_keeps_the_decay_in_fp32(world, inputs) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if name.endswith((".A_log", ".D"))}
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 3


def test_weights_on_disk_are_the_training_models(world) -> None:
    index = json.loads((world.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    saved = {}
    for name in sorted(set(index["weight_map"].values())):
        saved.update(load_file(world.folder / name))
    assert set(saved) == set(index["weight_map"])
    model = world.cfg.model
    names = NameMap(model.hybrid_pattern, model.num_query_groups, model.kv_channels)
    back = names.to_megatron(saved)
    state = {name: value for name, value in world.model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert set(back) == {name for name in state if not name.endswith("_extra_state")}
    for name, value in back.items():
        assert torch.equal(value, state[name]), name


def test_unknown_and_missing_weights_are_listed(world) -> None:
    model = world.cfg.model
    names = NameMap(model.hybrid_pattern, model.num_query_groups, model.kv_channels)
    state = dict(world.model.state_dict())
    state["language_model.decoder.layers.0.mixer.extra"] = torch.zeros(1)
    del state["language_model.decoder.layers.1.self_attention.linear_qkv.weight"]
    with pytest.raises(
        ValueError, match=r"unknown \[.*layers.0.mixer.extra'\], missing \[.*layers.1.self_attention.linear_qkv"
    ):
        names.to_hf(state)
    exported = names.to_hf(world.model.state_dict())
    del exported["language_model.backbone.layers.1.mixer.k_proj.weight"]
    with pytest.raises(ValueError, match="k_proj"):
        names.to_megatron(exported)


def test_query_key_value_are_split_per_group() -> None:
    names = NameMap("*", num_query_groups=2, head_dim=1)
    # Two groups of two query heads, one key, one value.
    fused = torch.arange(8.0).unsqueeze(1)
    q, k, v = names._split_qkv(fused)
    assert [part.flatten().tolist() for part in (q, k, v)] == [[0, 1, 4, 5], [2, 6], [3, 7]]


def test_an_export_is_whole_or_not_there(world, tmp_path, monkeypatch) -> None:
    import hybridprune_megatron.export.write as write

    target = tmp_path / "hf"
    export_model(world.model, world.cfg, target)
    (target / "old").touch()
    with monkeypatch.context() as patch:
        patch.setattr(write, "copy_code", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_model(world.model, world.cfg, target)
    assert (target / "old").exists()
    export_model(world.model, world.cfg, target)
    assert not (target / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
