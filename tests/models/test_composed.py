"""Configurations of tests that were not composed each time are those that Hydra composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import load_config
from hybridprune_megatron.layers.kinds import KINDS
from tests.models import composed
from tests.models.test_layer_kinds import Toy
from tests.models.tiny import tiny_config

FIXED = ("experiment=demo", "model.hidden_size=32", "model.num_attention_heads=4", "model.init_checkpoint=null")
LISTED = "reduction.schedule={name: listed, retention: [1.0,0.6,0.6,0.4,0.3,0.3,0.2,0.2,0.2,0.2]}"
LORA = ("tuning=lora", "tuning.lora.rank=3", "model.trainable.projector=true", "tuning.lora.targets=[projector]")
EXPERTS = ("parallel.tensor=2", "parallel.sequence_parallel=true", "trainer.devices=2", "model=demo_experts")
CHANGES = [
    (),
    ("reduction.budget=0.4", LISTED),
    ("reduction=evs", "reduction.front.retention=0.75", "model.num_attention_heads=8"),
    ("reduction=utrc", "reduction.front=tome", "reduction.front.retention=0.75", "name=1.10"),
    (*LORA, "optim.lr=1e-2"),
    ("trainer.precision=bf16", "fp8=none", "trainer.recompute=full", "model.spec=torch"),
    ("reduction.score={name: random, seed: 3}", "reduction.select.dropped=merge", "data.train=null"),
    ("reduction.select.multiple_of=2", *EXPERTS),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_changes_are_those_of_the_command_line(
    changes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_config([*FIXED, *changes])
    assert composed.composed(FIXED, changes) == expected
    monkeypatch.setenv(composed.FOLDER, str(tmp_path))
    assert composed.composed(FIXED, changes) == expected
    # What was left there.
    monkeypatch.setattr(composed, "_changed", None)
    assert composed.composed(FIXED, changes) == expected


def test_a_kind_of_layer_that_was_added_is_in_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    before = composed.composed(FIXED, ())
    monkeypatch.setitem(KINDS, Toy.symbol, Toy())
    after = composed.composed(FIXED, ())
    assert after == load_config(FIXED)
    assert [*before.tuning.lora.targets, *Toy.targets] == list(after.tuning.lora.targets)


@pytest.mark.parametrize("refused", ["optim.lr=null", "optim.lrr=1", "reduction=best", "model.num_attention_heads=7"])
def test_what_the_command_line_refuses_is_refused(refused: str) -> None:
    with pytest.raises(ConfigError) as expected:
        load_config([*FIXED, refused])
    with pytest.raises(ConfigError) as found:
        composed.composed(FIXED, [refused])
    assert str(found.value) == str(expected.value)


def test_a_configuration_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config().trainer.max_steps = 77
    assert tiny_config().trainer.max_steps != 77
    monkeypatch.setenv(composed.FOLDER, str(tmp_path))
    tiny_config().trainer.max_steps = 77
    assert tiny_config().trainer.max_steps != 77
    assert tiny_config("trainer.max_steps=78").trainer.max_steps == 78
