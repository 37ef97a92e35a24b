"""A tokenizer's folder from anywhere: no code of it runs, nobody is asked, no other file is read."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.data.tokenizer import load_tokenizer
from tests.hostile.conftest import ROOT, Refused, script

MARK = "it_ran"
CODE = f"""
from pathlib import Path
from transformers import PreTrainedTokenizerFast, PretrainedConfig

(Path(__file__).parent / "{MARK}").touch()
Path("{MARK}").touch()


class Own(PreTrainedTokenizerFast):
    pass


class OwnConfig(PretrainedConfig):
    model_type = "own"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's tokenizer with code; whoever is asked to run it is a failure."""

    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(ROOT / "assets" / "demo" / "tokenizer", tmp_path / "tokenizer"))
    (copy / "own.py").write_text(CODE)
    return copy


def settings(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def model(folder: Path) -> None:
    """A config.json that names code, as folders of models have."""
    names = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))


def without_file(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder.parent / "elsewhere.json").write_text((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        settings(**values)(folder)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (settings(auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own"), "code of its own"),
        (settings(auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own"), "code of its own"),
        (settings(auto_map=["own.Own", "own.Own"], tokenizer_class="Own"), "code of its own"),
        (settings(auto_map={"AutoTokenizer": ["a/b--own.Own", None]}, tokenizer_class="Own"), "code of its own"),
        (settings(auto_map={"AutoTokenizer": 7}, tokenizer_class="Own"), "cannot be read"),
        (without_file(tokenizer_file="../elsewhere.json"), "tokenizer_file='../elsewhere.json', which is not in"),
        (without_file(vocab_file="/etc/passwd"), "vocab_file='/etc/passwd', which is not in the folder"),
        (settings(fast_tokenizer_files=["tokenizer.0.0.1.json", "../tokenizer.0.0.2.json"]), "fast_tokenizer_files="),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 10**5), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 7}'), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[" * 10**5), "nested too deeply"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: os.mkfifo(folder / "added_tokens.json"), "'added_tokens.json' is not a file"),
        (lambda folder: shutil.rmtree(folder), "not a folder"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "not a folder"),
    ],
)
def test_what_needs_code_or_other_files_is_refused(folder: Path, change: Callable[[Path], Any], words: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=r"data\.tokenizer=") as raised:
        load_tokenizer(folder)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(folder.parent.rglob(MARK))


@pytest.mark.parametrize(
    "change",
    [
        settings(auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}),
        settings(tokenizer_file="/elsewhere/tokenizer.json", special_tokens_map_file="/x/special_tokens_map.json"),
        model,
    ],
)
def test_what_can_be_read_without_code_is(folder: Path, change: Callable[[Path], Any]) -> None:
    plain = load_tokenizer(folder).encode("What is it?")
    change(folder)
    assert load_tokenizer(folder).encode("What is it?") == plain
    assert not list(folder.parent.rglob(MARK))


def test_every_reader_refuses_it_in_one_line(folder: Path, run_dir: Path, refused: Refused, tmp_path: Path) -> None:
    from hybridprune_megatron.config import load_config
    from hybridprune_megatron.data.sample_encoder import SampleEncoder

    settings(auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")(folder)
    with pytest.raises(ValueError, match="code of its own"):
        SampleEncoder(load_config(["experiment=demo", f"data.tokenizer={folder}"]))
    arguments = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "hf"), f"data.tokenizer={folder}"]
    assert "code of its own" in refused(lambda: script("export_hf").main(arguments))
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.rglob(MARK))


def test_nothing_but_our_own_exports_may_bring_code() -> None:
    """Whoever trusts a folder's code says so in a program that runs exports, nowhere else."""
    found = {
        str(path.relative_to(ROOT))
        for folder in ("hybridprune_megatron", "scripts", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if "from_pretrained(" in (text := path.read_text()) and "trust_remote_code=True" in text
    }
    # The last two hold the words for a user to copy.
    assert found <= {
        "recipes/demo.py",
        "hybridprune_megatron/commands/ask.py",
        "scripts/model_table.py",
        "hybridprune_megatron/export/model_card.py",
        "hybridprune_megatron/export/configuration_hybridprune.py",
    }
    for path in (ROOT / "hybridprune_megatron").rglob("*.py"):
        for line in path.read_text().splitlines():
            if "AutoTokenizer.from_pretrained(" in line or "AutoConfig.from_pretrained(" in line:
                assert "trust_remote_code=False" in line, f"{path}: {line}"
