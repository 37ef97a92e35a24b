"""Which checkpoints count, and what may be loaded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from hybridprune_megatron.config.checkpoint_folder import (
    checkpoint_step,
    complete_checkpoints,
    latest_checkpoint,
    outdated_checkpoints,
    remove_incomplete,
)
from hybridprune_megatron.engine.train_log import TrainLog, read_train_log
from tests.worlds import run_world


def _fake(folder: Path, name: str, *files: str) -> None:
    (folder / name).mkdir()
    for file in files:
        (folder / name / file).write_text('{"step": 1}')


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    folder = tmp_path
    assert latest_checkpoint(folder / "missing") is None
    assert latest_checkpoint(folder) is None
    whole = ("metadata.json", "run.json")
    _fake(folder, "step_00000009", *whole)
    _fake(folder, "step_00000010", *whole)
    _fake(folder, "step_00000011", "metadata.json")
    _fake(folder, "step_00000012.incomplete", *whole)
    _fake(folder, "notes", *whole)
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000009", "step_00000010"]
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "step_00000010"
    remove_incomplete(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes",
        "step_00000009",
        "step_00000010",
        "step_00000011",
    ]


def test_only_what_the_run_wrote_and_does_not_keep_goes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    own = (10, 20, 30, 40, 50, 60)
    for step in (*own, 5, 70):
        _fake(folder, f"step_{step:08d}", "metadata.json", "run.json")
    (folder / "step_00000060" / "run.json").unlink()
    (folder / "step_00000015").symlink_to(folder / "step_00000010")

    def gone(**rules: int) -> list[int]:
        found = outdated_checkpoints(folder, {*own, 15}, **{"keep_last": 1, **rules})
        return [checkpoint_step(path) for path in found]

    # Neither the half of one that is newest, nor links and checkpoints of others.
    assert gone() == [10, 20, 30, 40]
    assert gone(keep_last=3) == [10, 20]
    assert gone(keep_last=9) == []
    assert gone(best=20) == [10, 30, 40]
    assert gone(keep_every_n_steps=20, best=30) == [10]


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def _index(folder: Path) -> None:
    from hybridprune_megatron.engine.checkpoint_index import read_index
    from hybridprune_megatron.engine.weights import load_initial_weights

    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"would import posix\.system.*do not load this checkpoint"):
        read_index(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"model.init_checkpoint=.* does not exist"):
        load_initial_weights(None, folder / "missing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a folder without metadata\.json"):
        load_initial_weights(None, folder)  # type: ignore[arg-type]


def test_index_that_runs_code_is_refused(tmp_path: Path) -> None:
    run_world(1, _index, tmp_path)


def _wrong_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights, save_weights
    from tests.engine.tiny import tiny_model

    init_model_parallel(seed=1)
    module = tiny_model()
    path, name = folder / "w.safetensors", "output_layer.weight"
    save_weights(module, path)
    right = load_file(path)
    too_small = right | {name: right[name][:-1].clone()}
    too_many = right | {"extra.weight": right[name]}
    too_few = {key: value for key, value in right.items() if key != name}
    for wrong, message in (
        (too_small, r"output_layer.weight is \(63, 32\), in the model \(64, 32\)"),
        (too_many, "holds weights that the model lacks: extra.weight"),
        (too_few, "has no weight 'output_layer.weight'"),
    ):
        save_file({key: value.clone() for key, value in wrong.items()}, path)
        with pytest.raises(ValueError, match=message):
            load_initial_weights(module, path)


def _wrong_checkpoint(folder: Path) -> None:
    import torch

    from hybridprune_megatron.engine.checkpoint import CheckpointSaver, load_checkpoint
    from hybridprune_megatron.engine.optimization import allocate_state, build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights
    from tests.engine.job import tiny_job
    from tests.engine.tiny import tiny_model

    init_model_parallel(seed=1)
    job = tiny_job(folder)
    state = build_train_state(tiny_model(), job.optim, job.trainer, job.parallel, torch.device("cpu"))
    allocate_state(state.optimizer)
    path = CheckpointSaver(folder).save(4, state, {0: {"any": 1}, 1: [2]}, {"thing": [1, 2.5]}, {"note": "x"})
    loaded = load_checkpoint(path, state, [1])
    assert (loaded["trainer"], loaded["loader"]) == ({"thing": [1, 2.5]}, {1: [2]})
    with pytest.raises(ValueError, match=r"is of another model: .*mismatch.*position_embeddings.*check model"):
        load_initial_weights(tiny_model(length=8), path)
    (path / "run.json").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        load_checkpoint(path, state)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_world(1, _wrong_checkpoint, tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    run_world(1, _wrong_weights, tmp_path)


def test_log_is_cut_back_and_survives_a_broken_line(tmp_path: Path) -> None:
    log = TrainLog(tmp_path / "deep" / "train_log.jsonl")
    losses = [0.1 + 0.2, 1 / 3, 2.0]
    for step, loss in enumerate(losses, start=1):
        log.append({"step": step, "loss": loss})
    with log.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["loss"] for row in read_train_log(log.path)] == losses
    log.truncate_after(2)
    assert log.path.read_text().count("\n") == 2
    log.append({"step": 3, "loss": 5.0})
    assert [row["loss"] for row in read_train_log(log.path)] == [*losses[:2], 5.0]
    log.path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_train_log(log.path)
