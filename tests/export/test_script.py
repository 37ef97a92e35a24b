"""From a run's checkpoint, as training leaves it, to the exported folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint
from hybridprune_megatron.engine.checkpoint import SHARDED_FORMAT
from tests.own_time import HANG_SECONDS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "export_hf.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("export_hf", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(world, tmp_path_factory) -> Path:
    """A run of four processes that saved two checkpoints and was killed in a third."""
    folder = tmp_path_factory.mktemp("run")
    config = plain_config(world.cfg)
    config["parallel"] |= {"tensor": 2, "pipeline": 2, "sequence_parallel": True}
    config["trainer"] |= {"devices": 4}
    config["model"] |= {"hybrid_pattern": "M*-|M*", "spec": "te"}
    written = folder / "checkpoints" / "step_00000010"
    written.mkdir(parents=True)
    dist_checkpointing.save({"model": world.model.sharded_state_dict(metadata=dict(SHARDED_FORMAT))}, str(written))
    (written / "run.json").write_text(json.dumps({"step": 10, "config": config}))
    for name in ("step_00000002", "step_00000012.incomplete"):
        shutil.copytree(written, written.with_name(name))
    return folder


def test_the_newest_complete_checkpoint_of_a_run(run_dir) -> None:
    newest = run_dir / "checkpoints" / "step_00000010"
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir / "checkpoints") == find_checkpoint(newest) == newest
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_checkpoint(run_dir / "nothing")


def test_the_configuration_of_a_run_for_one_process(run_dir) -> None:
    cfg = checkpoint_config(find_checkpoint(run_dir), ["reduction.budget=0.4"])
    assert cfg.model.hybrid_pattern == "M*-M*"
    assert cfg.parallel.model_parallel_size == 1
    assert cfg.reduction.budget == 0.4
    assert cfg.model.vision is not None
    with pytest.raises(ValueError, match="budgt"):
        checkpoint_config(find_checkpoint(run_dir), ["reduction.budgt=0.4"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=nemotron_3_nano_30b_a3b", "data.train=x", "data.tokenizer=x", "model.init_checkpoint=x"],
        ["experiment=demo", "parallel.context=2", "trainer.devices=2"],
        *(["experiment=twin", f"fp8={recipe}", "trainer.precision=bf16"] for recipe in ("tensorwise", "delayed")),
    ],
    ids=lambda overrides: " ".join(overrides[:2]),
)
def test_one_process_reads_the_configuration_of_any_run(overrides: list[str], tmp_path: Path) -> None:
    saved = load_config(overrides)
    (tmp_path / "run.json").write_text(json.dumps({"step": 1, "config": plain_config(saved)}))
    cfg = checkpoint_config(tmp_path, [])
    assert (cfg.parallel.model_parallel_size, cfg.parallel.expert, cfg.fp8.recipe) == (1, 1, None)
    assert cfg.reduction == saved.reduction


def test_a_run_is_exported(script, world, run_dir, tmp_path, capsys) -> None:
    script.main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "hf")])
    assert "step_00000010 exported" in capsys.readouterr().out
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = world.hf.state_dict()
    assert set(exported) == set(wanted)
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


def test_a_folder_of_weights_is_exported_as_the_file_in_it(script, tmp_path) -> None:
    file, folder = SCRIPT.parents[1] / "assets" / "demo" / "base.safetensors", tmp_path / "imported"
    folder.mkdir()
    shutil.copy(file, folder / "model.safetensors")
    for source, out in ((file, "of_file"), (folder, "of_folder")):
        script.main(["--checkpoint", str(source), "--out", str(tmp_path / out), "experiment=demo"])
    of_file, of_folder = (load_file(tmp_path / out / "model.safetensors") for out in ("of_file", "of_folder"))
    assert of_file.keys() == of_folder.keys()
    assert all(torch.equal(of_file[name], of_folder[name]) for name in of_file)


def test_bare_weights_need_a_configuration(script, world, tmp_path, capsys) -> None:
    weights = tmp_path / "base.safetensors"
    save_file({"some.weight": torch.zeros(1)}, weights)
    with pytest.raises(SystemExit, match="2"):
        script.main(["--checkpoint", str(weights), "--out", str(tmp_path / "hf"), "model=demo"])
    error = capsys.readouterr().err
    assert error.startswith("hybridprune export: model.init_checkpoint=")
    assert error.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def test_help_and_wrong_arguments_are_quick() -> None:
    shown = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert "--checkpoint" in shown.stdout
    wrong = subprocess.run(
        [sys.executable, SCRIPT, "--out", "x"], capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    assert wrong.returncode == 2
