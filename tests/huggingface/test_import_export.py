"""From a Hugging Face folder to a checkpoint of ours and back: every byte, and what is wrong in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridprune_megatron.config.outputs import MARKER
from hybridprune_megatron.huggingface.names import CONSTANTS
from hybridprune_megatron.huggingface.source import TensorFiles, open_weights, same_bytes
from tests.parity.twins import radio_twin, write_language_twin, write_vision_twin
from tests.worlds import run_world

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model in bf16 and a video model as published: bf16, decays and constants in fp32."""
    root = tmp_path_factory.mktemp("originals")
    write_language_twin(root / "language", "12b", torch.bfloat16)
    write_language_twin(root / "experts", "latent experts", torch.bfloat16)
    _add_token_predictor(root / "experts")
    write_vision_twin(root / "video")
    (root / "video" / "configuration.py").write_text("# remote code\n")
    return {name: root / name for name in ("language", "experts", "video")}


def _add_token_predictor(folder: Path) -> None:
    """A tensor of the layers that predict several tokens, as Nemotron 3 has them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.layers.0.mixer.q_proj.weight"] = "extra.safetensors"
    save_file({"mtp.layers.0.mixer.q_proj.weight": torch.randn(3, 5)}, folder / "extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _import(source: Path, out: Path, conf: Path) -> None:
    script("import_hf").main(
        [str(source), "--name", "twin", "--out", str(out), "--conf", str(conf), "--max-shard-gib", "0.00002"]
    )


def _export(group: Path, original: Path, out: Path) -> None:
    """From imported weights through the training model to the original's layout."""
    from omegaconf import OmegaConf

    from hybridprune_megatron.config.schema import ModelConfig
    from hybridprune_megatron.export.plain import export_plain
    from tests.parity.ours import config_with, model_of

    values: Any = OmegaConf.to_container(OmegaConf.load(group))
    cfg = config_with(ModelConfig.of({**values, "spec": "torch"}))
    export_plain(model_of(cfg), cfg, original, out)


@pytest.mark.parametrize("kind", ["language", "experts", "video"])
def test_every_tensor_comes_back_with_its_bytes(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    original, conf = folders[kind], tmp_path / "conf"
    (conf / "model").mkdir(parents=True)
    run_world(1, _import, original, tmp_path / "ours", conf)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    imported, direct = open_weights(tmp_path / "ours"), open_weights(original)
    assert set(imported.names) == set(direct.names)
    assert all(same_bytes(imported.read(name), direct.read(name)) for name in direct.names)
    run_world(1, _export, conf / "model" / "twin.yaml", original, tmp_path / "back")
    before, after = TensorFiles(original), TensorFiles(tmp_path / "back")
    assert {name: file.name for name, file in after.files.items()} == {
        name: file.name for name, file in before.files.items()
    }
    for name in before.names:
        assert same_bytes(after.read(name), before.read(name)), name
    others = {file.name for file in original.iterdir() if file.suffix != ".safetensors"}
    assert others | {"README.md", MARKER} == {
        p.name for p in (tmp_path / "back").iterdir() if p.suffix != ".safetensors"
    }
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (original / "config.json").read_text()
    )


def _assemble(language: Path, tower: Path, out: Path, conf: Path) -> None:
    arguments = [str(language), "--tower", str(tower), "--frame-size", "32", "--name", "both", "--out", str(out)]
    script("import_hf").main([*arguments, "--conf", str(conf)])


def _weights_of(group: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from hybridprune_megatron.config.schema import ModelConfig
    from hybridprune_megatron.engine.weights import whole_weights
    from tests.parity.ours import config_with, model_of

    values: Any = OmegaConf.to_container(OmegaConf.load(group))
    model = model_of(config_with(ModelConfig.of({**values, "spec": "torch"})))
    return {name: value.numpy() for name, value in whole_weights(model).items()}


def test_a_language_model_and_a_tower_become_a_video_model(folders: dict[str, Path], tmp_path: Path) -> None:
    tower, conf = radio_twin(), tmp_path / "conf"
    tower.save_pretrained(tmp_path / "radio")
    (conf / "model").mkdir(parents=True)
    run_world(1, _assemble, folders["language"], tmp_path / "radio", tmp_path / "both", conf)
    found = run_world(1, _weights_of, conf / "model" / "both.yaml")[0]
    for name, value in tower.state_dict().items():
        if not name.endswith(CONSTANTS):
            assert torch.equal(torch.from_numpy(found[f"vision_model.{name}"]), value), name
    language = open_weights(folders["language"])
    for name in language.names:
        assert torch.equal(torch.from_numpy(found[name]), language.read(name).float()), name
    assert found["mlp1.1.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert (found["mlp1.0.weight"] == 1).all()


def _changed(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def _without(name: str) -> Any:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"].pop(name)
        tensors = load_file(file)
        tensors.pop(name)
        save_file(tensors, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _truncated(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def _config(**values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("mlp1.1.weight"), r"unknown none, missing mlp1.1.weight; nothing was converted"),
        (_without("language_model.backbone.layers.7.mixer.k_proj.weight"), r"missing .*layers.7.mixer.k_proj.weight"),
        (_truncated, r"is not a complete safetensors file"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), r"lacks 1 of its weight files, first model-"),
        (lambda folder: (folder / "config.json").unlink(), r"config.json cannot be read"),
        (_config(model_type="llama"), r"model_type=llama: models of nemotron_h, .* can be read"),
        (_config(llm_config={"hybrid_override_pattern": "MGM*"}), r"supported are M \(Mamba\), .*E \(experts\), not G"),
        (_config(force_image_size=36), r"model.vision.frame_size=36"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    folder = _changed(folders["video"], tmp_path / "changed", change)
    with pytest.raises(SystemExit, match="2"):
        script("import_hf").main([str(folder), "--name", "twin", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
