"""The command line as a user meets it: exit codes, time, help, and what is imported on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import load_config, parse_command_line
from hybridprune_megatron.config.compose import CONF_DIR
from hybridprune_megatron.config.fields import field_help, key_help, leaf_keys
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.help import COMMON_KEYS, GROUPS
from hybridprune_megatron.config.reduction_schema import PARTS
from hybridprune_megatron.config.resume import check_resume
from tests.own_time import HANG_SECONDS, run_timed

CHECKOUT = CONF_DIR.parent
HEAVY = ("torch", "megatron", "nemo", "lightning", "transformers", "av", "multistorageclient")


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("foo=1", "foo=1: unknown key"),
        ("reduction.budget=1.5", "reduction.budget=1.5: must be"),
        ("experiment=x", "experiment=x"),
    ],
)
def test_recipe_reports_in_one_line_and_three_seconds(override: str, start: str, tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "recipes/finetune.py"), override]
    done, seconds = run_timed(command, tmp_path, limit_s=3)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"hybridprune finetune: {start}")
    assert done.stderr.count("\n") == 1
    assert seconds < 3
    assert not list(tmp_path.iterdir())


def test_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from hybridprune_megatron.config import load_config\n"
        "load_config(['experiment=demo'])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    )
    done = run_python("-c", code, *HEAVY, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_error_path_of_the_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "heavy, recipe = sys.argv[3:], sys.argv[1]\n"
        "sys.argv = sys.argv[1:3]\n"
        "try:\n"
        "    runpy.run_path(recipe, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({name.partition('.')[0] for name in sys.modules} & set(heavy)))"
    )
    done = run_python("-c", code, str(CHECKOUT / "recipes/finetune.py"), "foo=1", *HEAVY, cwd=tmp_path)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr


def test_missing_data_is_an_error_of_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^data.train=runs/demo/data/train: is not there"):
        parse_command_line(["experiment=demo"])
    assert parse_command_line(["experiment=demo"], need_files=False).name == "demo_by_hand"


def test_a_run_continues_only_with_its_own_settings(tmp_path: Path) -> None:
    cfg = load_config(["experiment=demo", f"output_dir={tmp_path}"])
    check_resume(cfg)
    checkpoint = tmp_path / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").write_text("{}")
    (checkpoint / "run.json").write_text(json.dumps({"step": 50, "config": plain_config(cfg)}))
    check_resume(cfg)
    longer = ["experiment=demo", f"output_dir={tmp_path}", "trainer.max_steps=400", "trainer.devices=2", "parallel=tp2"]
    check_resume(load_config(longer))
    with pytest.raises(ConfigError, match=r"reduction.budget=0.35: .* holds a run with reduction.budget=0.25; give"):
        check_resume(load_config(["experiment=demo", f"output_dir={tmp_path}", "reduction.budget=0.35"]))
    # Its weights have other names.
    with pytest.raises(ConfigError, match=r"model.spec=te: .* holds a run with model.spec=auto; give"):
        check_resume(load_config(["experiment=demo", f"output_dir={tmp_path}", "model.spec=te"]))


def test_help_shows_groups_keys_and_values(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help", "experiment=demo", "reduction.budget=0.35"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group in GROUPS:
        assert f"  {group} " in text
        for path in (CONF_DIR / group).glob("*.yaml"):
            assert path.stem in text
    assert "reduction.budget=0.35" in text
    assert "model.init_checkpoint=assets/demo/base.safetensors" in text
    assert "hybridprune finetune experiment=demo" in text
    assert max(map(len, text.splitlines())) <= 120
    assert set(GROUPS) == {path.name for path in CONF_DIR.iterdir() if path.is_dir()}


def test_help_all_explains_every_key(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help-all"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    keys = leaf_keys()
    assert len(keys) > 60
    assert set(COMMON_KEYS) <= set(keys)
    for key in keys:
        assert f"  {key}=" in text
        assert key_help(key), f"{key} has no line in the Attributes section of its dataclass"
        assert key_help(key).endswith("."), f"{key}: {key_help(key)}"
    for part, registry in PARTS.items():
        for name in registry.names:
            assert f"\nWith reduction.{part}={name}: " in text
            for field in fields(registry.find(name)):
                assert f"  reduction.{part}.{field.name}=" in text
                assert field_help(registry.find(name), field.name).endswith("."), (part, name, field.name)


def test_cfg_job_prints_the_resolved_configuration(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--cfg", "job", "experiment=demo", "name=x"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["output_dir"] == "runs/x"
    assert shown["exp_manager"]["explicit_log_dir"] == "runs/x"
    assert shown["model"]["vision"]["patch_size"] == 16
    # Keys of the parts that are chosen, whether the files name them or not.
    assert shown["reduction"]["score"]["mamba_pooling"] == "mean"
    assert shown["reduction"]["schedule"] == {"name": "sigmoid", "midpoint": 0.2, "slope": 10.0, "floor": 0.15}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--multirun"], "--multirun: unknown option; allowed are --help, --help-all, --cfg job and key=value"),
        (["--cfg", "hydra"], "--cfg hydra: only `--cfg job`"),
        (["--help", "foo=1"], "foo=1: unknown key foo"),
        (["--cfg=job", "reduction.budget=2"], "reduction.budget=2.0: must be above 0"),
    ],
)
def test_bad_options(argv: list[str], line: str, capsys) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_command_line(argv)
    assert str(refused.value).startswith(line)
    assert capsys.readouterr().out == ""


def test_values_of_the_demo_file_arrive() -> None:
    """What the experiment says is what the run gets (a wrong order of the defaults would lose it silently)."""
    cfg = load_config(["experiment=demo"])
    said = yaml.safe_load((CONF_DIR / "experiment/demo.yaml").read_text(encoding="ascii"))
    said.pop("defaults")

    def compare(owner: object, values: dict, prefix: str) -> None:
        for name, value in values.items():
            found = getattr(owner, name)
            if is_dataclass(found):
                compare(found, value, f"{prefix}{name}.")
            else:
                assert found == value, prefix + name

    compare(cfg, said, "")
