"""Changes of Hugging Face folders, each of which makes one what nobody should import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hybridprune_megatron.huggingface.folder import model_values, read_config
from hybridprune_megatron.huggingface.source import INDEX_FILE, TranslatedWeights, open_weights

Change = Callable[[Path], Any]


def values_of(folder: Path) -> dict[str, Any]:
    weights = open_weights(folder)
    assert isinstance(weights, TranslatedWeights)
    return model_values("twin", read_config(folder), weights.files.shape, weights.table)


def config(group: str | None = None, drop: tuple[str, ...] = (), **fields: Any) -> Change:
    """Changes fields of config.json, or of one of its objects."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        values = whole[group] if group else whole
        values |= fields
        for name in drop:
            del values[name]
        (folder / "config.json").write_text(json.dumps(whole))

    return change


def text(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def index(change: Callable[[dict[str, Any]], Any]) -> Change:
    def of(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        changed = change(content)
        (folder / INDEX_FILE).write_text(json.dumps(content if changed is None else changed))

    return of


def renamed(name: str) -> Change:
    """The file of one tensor lies elsewhere, and the index says so."""

    def change(content: dict[str, Any]) -> None:
        content["weight_map"]["backbone.norm_f.weight"] = name

    return index(change)


def moved_away(folder: Path) -> None:
    """A weight file is a link to one outside."""
    file = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"]["backbone.norm_f.weight"]
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], name: str = "backbone.norm_f.weight") -> Change:
    def of(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        file = folder / content["weight_map"][name]
        values = load_file(file)
        change(values)
        save_file(values, file, metadata={"format": "pt"})

    return of


def in_float8(values: dict[str, torch.Tensor]) -> None:
    values["backbone.norm_f.weight"] = values["backbone.norm_f.weight"].to(torch.float8_e4m3fn)


def without_head(folder: Path) -> None:
    tensors(lambda values: values.pop("lm_head.weight"), "lm_head.weight")(folder)
    index(lambda content: content["weight_map"].pop("lm_head.weight") and None)(folder)
    config(tie_word_embeddings=False)(folder)
