"""The exported folder: self-contained, complete, and the way back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from hybridprune_megatron.engine.weights import whole_weights
from hybridprune_megatron.export.write import export_model
from hybridprune_megatron.huggingface.source import open_weights, same_bytes
from tests.export.conftest import other_transformers

ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hybridprune_megatron", "megatron", "nemo", "lightning"):
            raise ModuleNotFoundError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
folder, clip, checkout, version, *packages = sys.argv[1:]
sys.path[:0] = packages
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor
assert transformers.__version__ == version
assert checkout not in sys.path
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, videos=[clip], return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
"""


def answer_alone(folder: Path, clip: Path, tmp_path: Path) -> list[int]:
    """Four tokens of an answer, from a process that cannot import this package."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    checkout = str(Path(__file__).resolve().parents[2])
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    arguments = [str(folder), str(clip), checkout, transformers.__version__, *other_transformers()]
    command = [sys.executable, "-I", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_export_answers_without_this_package(world, clips, tmp_path) -> None:
    text = "<SPECIAL_11>User\n<video>What is it?\n<SPECIAL_11>Assistant\n"
    inputs = world.processor(text=text, videos=[str(clips[0])])
    here = world.hf.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert answer_alone(world.folder, clips[0], tmp_path) == here


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
    # The training tokenizer has no end of text; lmms-eval stops at the tokenizer's.
    assert tokenizer.eos_token_id == config.eos_token_id


def test_the_tokenizer_ends_with_the_answer_whatever_its_files_say(world, tmp_path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(world.cfg.data.tokenizer, tokenizer)
    (tokenizer / "special_tokens_map.json").write_text('{"eos_token": {"content": "<unk>"}, "unk_token": "<unk>"}')
    cfg = replace(world.cfg, data=replace(world.cfg.data, tokenizer=str(tokenizer)))
    loaded = AutoTokenizer.from_pretrained(export_model(world.model, cfg, tmp_path / "hf"))
    assert (loaded.eos_token, loaded.unk_token) == ("<SPECIAL_12>", "<unk>")


def test_reduction_as_an_argument(world, inputs) -> None:
    def loaded(**settings):
        return AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, **settings).eval()

    full = loaded(reduction=None)
    assert full.config.reduction is None
    with torch.no_grad():
        out = full(**inputs, output_reduction=True)
    assert {len(layer[1]) for layer in out.reduction.positions} == {4 * 7}
    assert not out.logits[inputs["attention_mask"].bool()].isnan().any()
    less = loaded(reduction={"budget": 0.4})
    assert less.config.reduction["score"] == world.hf.config.reduction["score"]
    assert sum(less.config.reduction["retention"]) / 5 == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"budgt": 0.4}, "did you mean reduction.budget"),
        ({"budget": 2}, "must be above 0 and at most 1"),
        ({"budget": "0.4"}, "reduction.budget=0.4: must be a number"),
        ({"budget": 0.4, "retention": ["all"]}, r"reduction.schedule.retention\[0\]=all: must be a number"),
        ({"score": "best"}, "reduction.score=best"),
        ({"scorer": "best"}, "reduction.score=best"),
        ({"select": {"multiple_of": 8}}, "reduction.select.multiple_of=8: aligns the batches of training"),
        ({"local_choice": True}, "reduction.select.local_choice=True: aligns the batches of training"),
        ({"layers": "*"}, "reduction.layers"),
        ("half", "must be a dictionary"),
    ],
)
def test_a_reduction_that_cannot_be_is_refused_in_one_line(world, given, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, reduction=given)
    assert "\n" not in str(error.value)


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
    saved, state = open_weights(world.folder), whole_weights(world.model)
    assert set(saved.names) == set(state)
    for name, value in state.items():
        assert same_bytes(saved.read(name), value), name


def test_the_card_says_what_is_known_of_the_run(world, tmp_path) -> None:
    from hybridprune_megatron.export.model_card import read_facts

    folder = tmp_path / "mine" / "checkpoints" / "step_00000012"
    folder.mkdir(parents=True)
    header = {"step": 12, "consumed_samples": 34, "commit": "0123456789ab+", "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(header))
    rows = [{"step": step, "loss": 20.0 - step} for step in range(1, 15)]
    (folder.parents[1] / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = folder.parents[1] / "report.json"
    report.write_text(json.dumps({"steps": 12, "accuracy": {"reduced_after": 0.654}}))
    facts = read_facts(folder)
    # Steps 3 to 12.
    assert facts.loss == pytest.approx(12.5)
    cfg = replace(
        world.cfg,
        model=replace(world.cfg.model, init_checkpoint="/secret/place/base-model"),
        data=replace(world.cfg.data, train="/secret/place/clips"),
    )
    card = (export_model(world.model, cfg, tmp_path / "hf", facts=facts) / "README.md").read_text()
    for row in (
        "steps | 12",
        "packed sequences | 34",
        "loss, mean of the last steps | 12.5000",
        "accuracy, reduced after | 65.4 %",
    ):
        assert f"| {row} |" in card
    for row in ("commit of hybridprune_megatron | 0123456789ab+", "trained from | base-model", "data | clips"):
        assert f"| {row} |" in card
    assert "| budget (mean share of visual tokens over all layers) | 0.5 |" in card
    assert "as it comes, not clamped" in card
    assert "license: other" in card
    assert "secret" not in card
    report.write_text(json.dumps({"steps": 11, "accuracy": {"reduced_after": 0.654}}))
    assert read_facts(folder).accuracy == {}
    # Bare weights: a card without the rows that nobody knows.
    card = (world.folder / "README.md").read_text()
    assert "| trained from | random weights |" in card
    assert "| steps" not in card
    assert "None" not in card.replace("reduction=None", "")


def test_an_export_is_whole_or_not_there(world, tmp_path, monkeypatch) -> None:
    import hybridprune_megatron.export.write as write

    target = tmp_path / "hf"
    export_model(world.model, world.cfg, target, max_shard_size="20KB")
    shards = {path.name for path in target.glob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(write, "copy_code", lambda folder, score: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_model(world.model, world.cfg, target)
    assert shards == {path.name for path in target.glob("*.safetensors")}
    assert len(shards) > 1
    export_model(world.model, world.cfg, target)
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    # What is not the export's own stays, and the folder with it: tests/hostile/test_outputs.py has the other cases.
    (target / "notes").touch()
    with pytest.raises(ValueError, match="holds 'notes', which"):
        export_model(world.model, world.cfg, target)
    assert (target / "notes").exists()
