"""Files of a Hugging Face folder from anywhere: what is broken or lies elsewhere ends in one line."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridprune_megatron.engine.weights import load_initial_weights, save_weights
from hybridprune_megatron.export.write import export_model
from hybridprune_megatron.huggingface.source import INDEX_FILE
from tests.hostile.conftest import Refused, script
from tests.hostile.model_folders import (
    Change,
    config,
    in_float8,
    index,
    moved_away,
    renamed,
    tensors,
    text,
    values_of,
    without_head,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (text("config.json", "[" * 200_000), r"config.json cannot be read \(nested too deeply\)"),
        (text("config.json", "[]"), "is not a JSON object"),
        (text("config.json", b"\xff\xfe"), "not UTF-8"),
        (text("config.json", '{"model_type": NaN}'), "NaN is not a number"),
        (text("config.json", '{"model_type": "\\ud800"}'), "lone surrogate"),
        (text("config.json", '{"a": ' + "9" * 5000 + "}"), "digits"),
        (text("config.json", ""), "cannot be read"),
        (lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")), "not a file"),
        (lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()), "not a file"),
        (text(INDEX_FILE, "[" * 200_000), "nested too deeply"),
        (text(INDEX_FILE, "{"), "index.json cannot be read"),
        (text(INDEX_FILE, "[]"), "no weight_map"),
        (index(lambda content: {"weight_map": []}), "no weight_map"),
        (index(lambda content: {"weight_map": {}}), "no weight_map"),
        (renamed("/etc/passwd"), "names the file '/etc/passwd'"),
        (renamed("../hf/model.safetensors"), "only names of files in the folder itself"),
        (renamed(".."), "outside of the folder"),
        (renamed("."), "names the file"),
        (renamed(""), "names the file"),
        (renamed("config.json"), "is not a complete safetensors file"),
        (renamed("model-00001-of-00099.safetensors"), "lacks 1 of its weight files"),
        (
            index(lambda content: content["weight_map"].update({"backbone.norm_f.weight": ["a"]})),
            "lacks 1|names the file",
        ),
        (index(lambda content: content["weight_map"].update({"backbone.norm_f.weight": 7})), "lacks 1"),
        (
            index(lambda content: content["weight_map"].update({"x": content["weight_map"]["lm_head.weight"]})),
            "for x in",
        ),
        (text("model.safetensors", ""), "has both model.safetensors and model.safetensors.index.json"),
        (moved_away, "is a link to .*elsewhere.*, outside of the folder"),
        (tensors(in_float8), "backbone.norm_f.weight .* is F8_E4M3"),
        (tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(40, dtype=torch.int8)})), "is I8"),
        (tensors(lambda v: v["backbone.norm_f.weight"].fill_(torch.nan)), "40 values that are NaN or infinite"),
        (tensors(lambda v: v["backbone.norm_f.weight"][:1].fill_(-torch.inf)), "1 values that are NaN"),
        (
            tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(39)})),
            r"is \(39,\) in the folder and \(40,\)",
        ),
        (tensors(lambda v: v.update({"backbone.norm_f.weight": torch.ones(())})), r"is \(\) in the folder"),
        (without_head, "has no lm_head.weight, and config.json has tie_word_embeddings=false"),
        (text("hf_quant_config.json", "{}"), "its weights are quantized"),
        (
            lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"),
            r"tokenizer.json is a link to /etc/passwd",
        ),
        (lambda folder: (folder / "merges.txt").symlink_to(folder / "merges.txt"), "link that leads nowhere"),
    ],
)
def test_files_that_are_wrong_end_in_one_line(
    twins: dict[str, Path], refused_import: Callable[..., str], change: Change, words: str
) -> None:
    line = refused_import(twins["language"], change)
    assert re.search(words, line), line
    assert "root:" not in line


def test_bare_weights_are_checked_too(tiny: SimpleNamespace, tmp_path: Path) -> None:
    file, name = tmp_path / "w.safetensors", "mlp1.1.weight"
    save_weights(tiny.model, file)
    right = load_file(file)
    for value, words in (
        (right[name] * torch.nan, f"{name} has .* NaN or infinite"),
        (right[name].to(torch.float8_e5m2), f"{name} is float8_e5m2, which needs scales"),
        (right[name].to(torch.int8), f"{name} is int8, which needs scales"),
    ):
        save_file(right | {name: value}, file)
        with pytest.raises(ValueError, match=words):
            load_initial_weights(tiny.model, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config(mlp_hidden_act="gelu"), "mlp_hidden_act=gelu"),
        (renamed("../x.safetensors"), "only names of files"),
        (lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"), "is a link to /etc/passwd"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: None, "do not fit its configuration"),
    ],
)
def test_the_original_of_an_export_as_it_came_is_as_foreign(
    twins: dict[str, Path], run_dir: Path, refused: Refused, tmp_path: Path, change: Change, words: str
) -> None:
    original = Path(shutil.copytree(twins["language"], tmp_path / "hf"))
    change(original)
    arguments = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--plain", str(original)]
    if words.startswith("is a link"):
        # Of the run's own model, or its weights are refused first.
        shutil.rmtree(original)
        script("export_hf").main([*arguments[:3], str(original)])
        change(original)
    assert words in refused(lambda: script("export_hf").main(arguments))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "x", "-inf"])
def test_a_file_size_that_is_none(refused: Refused, twins: dict[str, Path], value: str) -> None:
    main = script("import_hf").main
    assert "--max-shard-gib" in refused(
        lambda: main([str(twins["language"]), "--name", "a", f"--max-shard-gib={value}"])
    )


def test_a_missing_or_strange_folder(refused: Refused, tmp_path: Path) -> None:
    main = script("import_hf").main
    (tmp_path / "file").write_text("x")
    for source in ("nowhere", "file", "a\0b"):
        refused(lambda source=source: main([str(tmp_path / source), "--name", "a", "--out", str(tmp_path / "out")]))


def test_a_snapshot_of_the_hub_is_read_through_its_links(twins: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(twins["language"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert values_of(snapshot) == values_of(twins["language"])
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*, outside of the folder"):
        values_of(snapshot)


def test_our_own_export_says_how_its_steps_are_clamped(tiny: SimpleNamespace, tmp_path: Path) -> None:
    cfg = replace(tiny.cfg, model=replace(tiny.cfg.model, time_step_min=1e-3))
    folder = export_model(tiny.model, cfg, tmp_path / "hf")
    assert values_of(folder)["time_step_min"] == 1e-3
    for change, words in (
        (config(conv_kernel=3), "conv_kernel=3"),
        (config(vision={"hidden_size": "${oc.env:HOME}"}), "vision"),
        (config(vision=[]), "vision"),
        (config("vision", unheard_of=1), "unheard_of"),
        (config(vision=None), "vision|unknown"),
        (config(unheard_of=1), "unheard_of"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        change(copy)
        with pytest.raises(ValueError, match=words) as raised:
            values_of(copy)
        assert "\n" not in str(raised.value)
        shutil.rmtree(copy)


def test_weights_of_a_folder_with_other_settings_are_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = export_model(tiny.model, tiny.cfg, tmp_path / "hf")
    load_initial_weights(tiny.model, folder, tiny.cfg.model)
    vision = replace(tiny.cfg.model.vision, image_mean=[0.1, 0.2, 0.3])
    for changed, words in (
        (replace(tiny.cfg.model, norm_epsilon=1e-6), "norm_epsilon=1e-05, and model.norm_epsilon=1e-06"),
        (replace(tiny.cfg.model, vision=vision), r"vision.image_mean=\[0.48"),
        (replace(tiny.cfg.model, num_query_groups=4), "num_query_groups=2, and model.num_query_groups=4"),
        (replace(tiny.cfg.model, time_step_min=0.1), "never"),
    ):
        if words == "never":
            # No clamp is what a folder without a limit says; the run may know better.
            load_initial_weights(tiny.model, folder, changed)
            continue
        with pytest.raises(ValueError, match=words):
            load_initial_weights(tiny.model, folder, changed)
