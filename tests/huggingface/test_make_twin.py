"""The twin of the video model: the demo's base model to the import, the published checkpoint's format to the eye."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridprune_megatron.config import Config, load_config
from hybridprune_megatron.huggingface.folder import model_values, read_config
from hybridprune_megatron.huggingface.source import TensorFiles, TranslatedWeights, open_weights, same_bytes

ROOT = Path(__file__).resolve().parents[2]
#: Said nowhere in a checkpoint: how it was begun, and what a run does with it.
OWN_KEYS = ("name", "init_std", "spec", "init_checkpoint", "trainable", "time_step_min")
#: These the import cannot tell apart, which changes no feature.
SKIPPED_TOKENS = ("num_cls_tokens", "num_register_tokens")
_SCALED = re.compile(r".*(attention\.o_proj|mlp\.fc2)\.(weight|bias)|.*layer_scale\d\.lambda1")


def _make_twin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_twin", ROOT / "scripts" / "make_twin.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load_config(["experiment=demo", f"model.init_checkpoint={ROOT}/assets/demo/base.safetensors"])


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "hf"
    _make_twin().write_twin(folder, cfg)
    return folder


def test_its_configuration_has_the_demos_sizes(twin: Path, cfg: Config) -> None:
    weights: Any = open_weights(twin)
    found = dict(model_values("twin", read_config(twin), weights.files.shape, weights.table))
    wanted = asdict(cfg.model)
    vision, wanted_vision = found.pop("vision"), wanted.pop("vision")
    assert {key: value for key, value in found.items() if key not in OWN_KEYS} == {
        key: value for key, value in wanted.items() if key not in OWN_KEYS
    }
    skipped = sum(wanted_vision[key] for key in SKIPPED_TOKENS)
    assert sum(vision[key] for key in SKIPPED_TOKENS) == skipped
    assert {key: value for key, value in vision.items() if key not in SKIPPED_TOKENS} == {
        key: value for key, value in wanted_vision.items() if key not in SKIPPED_TOKENS
    }


def test_its_weights_are_the_demos_in_the_published_dtypes(twin: Path, cfg: Config) -> None:
    files, ours = TensorFiles(twin), load_file(str(cfg.model.init_checkpoint))
    assert len({*files.files.values()}) > 3
    tower = "vision_model.radio_model."
    constants = {f"{tower}{name}" for name in ("summary_idxs", "input_conditioner.norm_mean")}
    assert constants | {f"{tower}model.blocks.2.attn.qkv.weight", "mlp1.1.weight", "language_model.lm_head.weight"} <= {
        *files.names
    }
    weights = open_weights(twin)
    assert isinstance(weights, TranslatedWeights)
    for name in weights.names:
        kept = name.endswith((".A_log", ".D"))
        if _SCALED.fullmatch(name) is None:
            assert same_bytes(weights.read(name), ours[name] if kept else ours[name].bfloat16()), name
    for block in range(3):
        linear, scale = f"vision_model.encoder.layer.{block}.mlp.fc2.weight", f"layer.{block}.layer_scale2.lambda1"
        folded = ours[linear] * ours[f"vision_model.encoder.{scale}"].unsqueeze(1)
        assert torch.equal(weights.read(linear), folded.bfloat16())


def test_it_has_a_tokenizer_and_is_not_written_over(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = (twin / "tokenizer.json").read_bytes()
    assert tokenizer == (ROOT / "assets" / "demo" / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        _make_twin().main(["--out", str(twin)])
    assert "exists; choose another folder" in capsys.readouterr().err
