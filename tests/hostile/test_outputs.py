"""``--out``: nothing that a user has vanishes, and what is written is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hybridprune_megatron.config.outputs import MARKER, check_file, check_output, whole_file, whole_folder
from tests.hostile.conftest import ROOT, Refused, contents, script

COMMAND = "scripts/some.py"


def write(out: Path, made_by: str = COMMAND, text: str = "new") -> None:
    with whole_folder(out, made_by) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text(text)
        (folder / "config.json").write_text("{}")


def test_an_earlier_product_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    write(out, text="old")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "x.pyc").write_bytes(b"")
    write(out)
    assert set(contents(out)) == {"deep", "deep/weights", "config.json", MARKER}
    assert (out / "deep" / "weights").read_text() == "new"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "link").symlink_to(out)
    write(tmp_path / "link", text="newer")
    assert (tmp_path / "link").is_symlink()
    assert (out / "deep" / "weights").read_text() == "newer"
    (tmp_path / "dangling").symlink_to(tmp_path / "not yet")
    write(tmp_path / "dangling")
    assert (tmp_path / "not yet" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "dangling", "empty", "link", "not yet"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def _file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("mine")


def _other_command(out: Path) -> None:
    shutil.rmtree(out)
    write(out, "scripts/other.py")


def _touched(out: Path) -> None:
    later = time.time_ns() + 10**9
    os.utime(out / "config.json", ns=(later, later))


def _linked(out: Path) -> None:
    (out / "config.json").rename(out.parent / "kept.json")
    (out / "config.json").symlink_to(out.parent / "kept.json")


def _forged(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "mine").write_text("1")
    (out / MARKER).write_text(json.dumps({"made_by": COMMAND, "files": {"mine": [1, 0]}}))


def _marker(text: str) -> Callable[[Path], Any]:
    return lambda out: (out / MARKER).write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_file, "is a file"),
        (lambda out: (out / MARKER).unlink(), "was not written by scripts/some.py"),
        (_other_command, "was not written by scripts/some.py"),
        (_marker("[]"), "was not written by"),
        (_marker("{"), "was not written by"),
        (_marker("[" * 100_000), "was not written by"),
        (_marker('{"made_by": "scripts/some.py"}'), "was not written by"),
        (_marker('{"made_by": "scripts/some.py", "files": []}'), "was not written by"),
        (_forged, "'mine', which was changed after"),
        (lambda out: (out / "notes.txt").write_text("mine"), "holds 'notes.txt', which scripts/some.py did not write"),
        (lambda out: (out / "deep" / "mine").write_text("mine"), "holds 'deep/mine'"),
        (lambda out: (out / "mine").mkdir(), "holds 'mine/'"),
        (lambda out: (out / "more").symlink_to(out), "holds 'more'"),
        (lambda out: (out / "__pycache__").mkdir() or (out / "__pycache__" / "mine.txt").write_text(""), "__pycache__"),
        (lambda out: (out / "config.json").write_text("{ }"), "'config.json', which was changed after"),
        (_touched, "'config.json', which was changed after"),
        (_linked, "'config.json', which was changed after"),
    ],
)
def test_anything_else_stays(tmp_path: Path, change: Callable[[Path], Any], words: str) -> None:
    out = tmp_path / "out"
    write(out, text="old")
    change(out)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--out=") as raised:
        write(out)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("out", [".", "input", "input/deep/er", "link", "link/new", "input/../input", ""])
def test_an_output_is_apart_from_the_inputs(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input").mkdir()
    Path("input/file").write_text("x")
    Path("link").symlink_to("input")
    before = contents(tmp_path)
    for inputs in (["input"], ["link"], [tmp_path / "input" / "file", "input"]):
        with pytest.raises(ValueError, match=r"which is read: give another one"):
            check_output(out, COMMAND, inputs)
    assert contents(tmp_path) == before


def _write_half(out: Path) -> None:
    with whole_folder(out, COMMAND) as folder:
        (folder / "half").mkdir()
        (folder / "half").mkdir()


def test_after_an_error_the_former_product_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, text="old")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="File exists"):
        _write_half(out)
    # A file that somebody adds while the new ones are written.
    with pytest.raises(ValueError, match="holds 'mine'"), whole_folder(out, COMMAND):
        (out / "mine").write_text("mine")
    assert contents(tmp_path) == before | {"out/mine": contents(out)["mine"]}
    with pytest.raises(OSError, match="no space"), whole_file(tmp_path / "file"):
        raise OSError("no space")
    assert not (tmp_path / "file").exists()
    for nowhere in (out / "config.json" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(ValueError, match="cannot be"):
            write(nowhere)


def test_an_export_eats_nothing(tiny: SimpleNamespace, run_dir: Path, refused: Refused, tmp_path: Path) -> None:
    main, step = script("export_hf").main, run_dir / "checkpoints" / "step_00000010"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(run_dir)
    before = contents(tmp_path)
    for out in (run_dir, tmp_path, step, step / "hf", run_dir / "checkpoints", tmp_path / "link", other, step / "x.py"):
        assert "--out=" in refused(lambda out=out: main(["--checkpoint", str(run_dir), "--out", str(out)])), out
    assert "is a file" in refused(lambda: main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "file")]))
    tokenizer = tiny.cfg.data.tokenizer
    assert "--out=" in refused(lambda: main(["--checkpoint", str(run_dir), "--out", str(Path(tokenizer).parent)]))
    in_tokenizer = Path(tokenizer) / "hf"
    assert "lies in" in refused(lambda: main(["--checkpoint", str(run_dir), "--out", str(in_tokenizer)]))
    assert contents(tmp_path) == before
    # Where the documentation writes it, twice.
    for budget in (0.5, 0.75):
        main(["--checkpoint", str(run_dir), "--out", str(run_dir / "hf"), f"reduction.budget={budget}"])
        assert json.loads((run_dir / "hf" / "config.json").read_text())["reduction"]["budget"] == budget
    (run_dir / "hf" / "README.md").write_text("my own words")
    line = refused(lambda: main(["--checkpoint", str(run_dir), "--out", str(run_dir / "hf")]))
    assert "'README.md', which was changed after" in line


@pytest.mark.parametrize("size", ["inf", "infGB", "nanGB", "-5GB", "0GB", "5", "GB", "", "5GB5GB"])
def test_a_shard_size_that_is_none(refused: Refused, run_dir: Path, tmp_path: Path, size: str) -> None:
    arguments = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "hf"), f"--max-shard-size={size}"]
    assert "--max-shard-size=" in refused(lambda: script("export_hf").main(arguments))


def test_an_import_eats_nothing(twins: dict[str, Path], refused: Refused, tmp_path: Path) -> None:
    source = Path(shutil.copytree(twins["language"], tmp_path / "hf"))
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_text("x")
    main, before = script("import_hf").main, contents(tmp_path)
    common = [str(source), "--name", "twin", "--conf", str(tmp_path / "conf")]
    for out in (source, tmp_path, source / "ours", tmp_path / "mine", source / "config.json"):
        assert "--out=" in refused(lambda out=out: main([*common, "--out", str(out)])), out
    tower = [*common, "--tower", str(twins["radio"])]
    assert "which is read" in refused(lambda: main([*tower, "--out", str(twins["radio"])]))
    for name in ("../../x", "/x", "a/b", "", "-x", ".x", "null", "True", "a b", "a\nb: 1", "1.10", "${x}"):
        line = refused(lambda name=name: main([str(source), f"--name={name}", "--out", str(tmp_path / "new")]))
        assert "--name=" in line or "unrecognized" in line, line
    missing = [str(source), "--name", "twin", "--conf", str(tmp_path / "none"), "--out", str(tmp_path / "new")]
    assert "has no folder model" in refused(lambda: main(missing))
    (tmp_path / "conf" / "model" / "linked.yaml").symlink_to(tmp_path / "mine" / "made.yaml")
    linked = [str(source), "--name", "linked", "--conf", str(tmp_path / "conf"), "--out", str(tmp_path / "new")]
    assert "exists with other values" in refused(lambda: main(linked))
    (tmp_path / "conf" / "model" / "linked.yaml").unlink()
    assert contents(tmp_path) == before
    for _ in range(2):
        main([*common, "--out", str(tmp_path / "ours")])
    assert (tmp_path / "conf" / "model" / "twin.yaml").is_file()


def test_the_other_programs_eat_nothing(
    tiny: SimpleNamespace, run_dir: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "questions.jsonl").write_text("mine")
    (mine / "needles.json").write_text("{}")
    (mine / "inputs").write_text("{}")
    weights = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    data = tmp_path / "data"
    (data / ".nv-meta").mkdir(parents=True)
    (data / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"../x.tar": 1}}')
    before = contents(tmp_path)
    step = str(run_dir / "checkpoints" / "step_00000010")
    grow = ["--pattern", "M", "--deeper", "MM", "--positions", "0", "--weights", str(weights), "--out"]
    for name, arguments, words in (
        ("make_twin", ["--out", str(mine)], "exists"),
        ("make_twin", ["--out", str(ROOT / "assets" / "demo" / "tokenizer" / "x")], "lies in"),
        ("make_lmms_task", ["--data", str(data), "--out", str(mine)], "was not written by scripts/make_lmms_task.py"),
        ("make_lmms_task", ["--data", str(data), "--out", str(data)], "which is read"),
        ("make_lmms_task", ["--data", str(data), "--out", str(data / "task")], "lies in"),
        ("make_demo_tokenizer", ["--out", str(mine)], "was not written by"),
        ("make_demo_data", ["--out", str(tmp_path), "--train", "0", "--validation", "1"], "validation"),
        ("precompute_features", ["--data", str(data), "--out", str(mine)], "exists: choose another folder"),
        ("save_weights", ["--checkpoint", step, "--out", str(weights)], "was not written by scripts/save_weights.py"),
        ("save_weights", ["--checkpoint", step, "--out", str(mine)], "was not written by"),
        ("save_weights", ["--checkpoint", step, "--out", f"{step}/w.safetensors"], "lies in"),
        ("grow_depth", [*grow, str(weights)], "which is read"),
        ("grow_depth", [*grow, str(mine / "inputs")], "was not written by studies/base/grow_depth.py"),
    ):
        if name == "make_demo_data":
            (tmp_path / "validation").mkdir()
            (tmp_path / "validation" / "needles.json").write_text("{}")
        program = script(name, "studies/base" if name == "grow_depth" else "scripts")
        assert words in refused(lambda program=program, arguments=arguments: program.main(arguments)), (name, words)
        if name == "make_demo_data":
            assert contents(tmp_path / "validation") == {"needles.json": contents(mine)["needles.json"]}
            shutil.rmtree(tmp_path / "validation")
    (data / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"x.tar": 1}}')
    before = contents(tmp_path)
    features = script("precompute_features").main
    for out in (mine, data, data / "features", tmp_path):
        assert "--out=" in refused(lambda out=out: features(["--data", str(data), "--out", str(out)])), out
    (tmp_path / ".new.partial").mkdir()
    line = refused(lambda: features(["--data", str(data), "--out", str(tmp_path / "new")]))
    assert "is not an unfinished data set" in line
    (tmp_path / ".new.partial").rmdir()
    assert contents(tmp_path) == before
    for _ in range(2):
        script("save_weights").main(["--checkpoint", step, "--out", str(tmp_path / "out.safetensors")])
    for wrong in ("[]", "{}", '{"shard_counts": [1]}', '{"shard_counts": {"x.tar": -1}}', "[" * 10**5):
        (data / ".nv-meta" / ".info.json").write_text(wrong)
        refused(lambda: features(["--data", str(data), "--out", str(tmp_path / "new")]))


def test_reports_and_pictures_replace_only_their_own(refused: Refused, tmp_path: Path) -> None:
    for name in ("plot.png", "report.json", "prefill.png"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    plan, scaling, bench = script("plan", "recipes"), script("scaling"), script("benchmark", "recipes")
    for arguments in (["--plot", str(tmp_path / "plot.png")], ["--measure", str(tmp_path / "report.json")]):
        line = refused(lambda arguments=arguments: plan.main([*arguments, "experiment=demo"]))
        assert "was not written by recipes/plan.py" in line
    assert "not written by scripts/scaling.py" in refused(lambda: scaling.main(["--plot", str(tmp_path / "plot.png")]))
    for name in ("report.json", "prefill.png"):
        assert f"{name} exists and was not written" in refused(lambda: bench.main(["--out", str(tmp_path)]))
        (tmp_path / name).rename(tmp_path / f"kept {name}")
    assert sorted(contents(tmp_path).values()) == sorted(before.values())
    (tmp_path / "plot.png").unlink()
    plan.main(["--plot", str(tmp_path / "plot.png"), "experiment=demo"])
    check_file(tmp_path / "plot.png", "recipes/plan.py", "--plot")


def test_a_fresh_demo_deletes_only_its_own(refused: Refused, tmp_path: Path) -> None:
    demo = script("demo", "recipes")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    (tmp_path / "report.json").symlink_to(tmp_path / "data" / "mine")
    before = contents(tmp_path)
    line = refused(lambda: demo.main(["--fresh", f"output_dir={tmp_path}"]))
    assert "has no inputs.json, so data is not the demo's" in line
    assert contents(tmp_path) == before
    line = refused(lambda: demo.main([f"output_dir={tmp_path}"]))
    assert "has report.json, but no inputs.json" in line
    assert contents(tmp_path) == before
    (tmp_path / "inputs.json").write_text("{}")
    demo.remove_products(tmp_path)
    assert contents(tmp_path) == {}
