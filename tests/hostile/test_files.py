"""What a run needs on disk and what is wrong with it: one line with the key, before anything slow is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridprune_megatron.config import ConfigError
from hybridprune_megatron.config.files import check_files
from hybridprune_megatron.config.flat import plain_config
from tests.hostile.configurations import with_keys

Refusal = Callable[..., str]
DEMO = "assets/demo"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides with which the demo could run, as far as its files go."""
    (tmp_path / "data" / ".nv-meta").mkdir(parents=True)
    return [f"data.train={tmp_path}/data", "data.validation=null", f"output_dir={tmp_path}/run"]


@pytest.fixture
def refusal(files: list[str]) -> Refusal:
    """The line that refuses the demo with some keys changed."""

    def look(*overrides: str) -> str:
        cfg = with_keys([*files, *overrides])
        with pytest.raises(ConfigError) as refused:
            check_files(cfg)
        assert str(refused.value).isprintable()
        return str(refused.value)

    return look


def test_the_demo_could_run(files: list[str], tmp_path: Path) -> None:
    check_files(with_keys(files))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_data_of_the_wrong_kind(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "videos").mkdir()
    assert refusal(f"data.train={tmp_path}/rows.jsonl").startswith(
        f"data.train={tmp_path}/rows.jsonl: is a file; give an Energon data set's folder or a metadataset .yaml"
    )
    assert refusal(f"data.validation={tmp_path}/videos").startswith(
        f"data.validation={tmp_path}/videos: is not an Energon data set: it has no folder .nv-meta"
    )
    assert "File name too long" in refusal(f"data.train={tmp_path}/{'x' * 300}")


def test_a_tokenizer_of_the_wrong_kind(refusal: Refusal, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    other = f"data.tokenizer={folder}"
    assert "holds no tokenizer (tokenizer.json, " in refusal(other)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"content": "<img>"}]}')
    assert "the tokenizer has no token <SPECIAL_10>, and prompts are written with" in refusal(other)
    (folder / "tokenizer.json").write_text("[" * 100_000)
    assert "nested too deeply" in refusal(other)
    assert "is a file" in refusal(f"data.tokenizer={DEMO}/tokenizer/tokenizer.json")


def test_weights_of_another_model(refusal: Refusal, tmp_path: Path) -> None:
    assert "holds weights of another model: 10 layers, model.hybrid_pattern=M-M*: 4" in refusal(
        "model.hybrid_pattern=M-M*"
    )
    assert "language_model.embedding.word_embeddings.weight (1024, 128), in the model (1024, 64)" in refusal(
        "model.hidden_size=64"
    )
    assert "mlp.linear_fc1.weight (512, 128), in the model (256, 128)" in refusal("model.ffn_hidden_size=256")
    weights = tmp_path / "weights.safetensors"
    for content, reason in (
        (b"", "a header of 0 bytes"),
        (b"\xff" * 16, "a header of 18446744073709551615 bytes"),
        (b"\x10" + b"\0" * 7 + b"not JSON at all!" * 2, "is not a complete safetensors file"),
    ):
        weights.write_bytes(content)
        assert reason in refusal(f"model.init_checkpoint={weights}")
    assert "is a folder without weights of its own" in refusal(f"model.init_checkpoint={tmp_path}")


def test_the_checkpoint_of_another_run(files: list[str], refusal: Refusal, tmp_path: Path) -> None:
    cfg = with_keys(files)
    step = tmp_path / "other" / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    (step / "metadata.json").write_text("{}")
    (step / "run.json").write_text(json.dumps({"config": plain_config(cfg)}))
    check_files(with_keys([*files, f"model.init_checkpoint={step}"]))
    assert f"give {step}" in refusal(f"model.init_checkpoint={tmp_path}/other")
    assert "kv_channels=32, model.kv_channels=16" in refusal(f"model.init_checkpoint={step}", "model.kv_channels=16")


def test_a_folder_that_cannot_be_written(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is a file" in refusal(f"output_dir={tmp_path}/file/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    assert "checkpoints is a file" in refusal()
    # Root may write anywhere, so the system is asked for somebody else.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"{tmp_path} cannot be written to" in refusal(f"output_dir={tmp_path}/new/run")


def test_layers_without_their_packages(refusal: Refusal) -> None:
    assert refusal("model.spec=te") == (
        "model.spec=te: transformer_engine, mamba_ssm, causal_conv1d not installed; install the gpu extra on a GPU "
        "machine or set model.spec=torch"
    )
