"""The command line of an analysis: its own keys, the configuration's keys, one line on what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybridprune_megatron.analysis.settings import AnalysisSettings
from hybridprune_megatron.config.own_keys import own_keys_help, read_own_keys

ROOT = Path(__file__).resolve().parents[2]


def test_own_keys_are_told_from_the_configuration(tmp_path):
    question = "question=What colour = {colour}: [a, b]?"
    settings, rest = read_own_keys(
        AnalysisSettings, [f"checkpoint={tmp_path}", "experiment=demo", "samples=7", "reduction.budget=0.35", question]
    )
    assert settings == AnalysisSettings(str(tmp_path), samples=7, question="What colour = {colour}: [a, b]?")
    assert rest == ["experiment=demo", "reduction.budget=0.35"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples=0", "samples=0: must be at least 1; set e.g. samples=64"),
        ("samples=many", "samples=many: must be a whole number; set e.g. samples=64"),
        ("top=1", "top=1.0: must be above 0 and below 1"),
        ("probe_samples=5", "probe_samples=5: must be 0 (no probe) or at least 20"),
        ("top=nan", "top=nan: must be above 0 and below 1"),
        ("out=", "out='': is empty, as an unset shell variable is; give it a value, or out=null"),
        ("data=nowhere", "data=nowhere: is not there"),
    ],
)
def test_a_wrong_value_is_one_line(override, message, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below, signs and all
        read_own_keys(AnalysisSettings, [f"checkpoint={tmp_path}", override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_must_be_named():
    with pytest.raises(ValueError, match="checkpoint=None: must be set; give checkpoint=<path>"):
        read_own_keys(AnalysisSettings, ["samples=3"])


def test_every_key_is_explained():
    names = [line.split()[0] for line in own_keys_help(AnalysisSettings).splitlines()]
    assert names == list(AnalysisSettings.__dataclass_fields__)


def test_errors_come_before_the_slow_imports():
    arguments = ["checkpoint=assets/demo/base.safetensors", "experiment=demo", "sample=3"]
    command = [sys.executable, "-X", "importtime", "recipes/analyze.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sample=3: unknown key sample" in done.stderr
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
