"""What each choice of layers can reach, and the line on layers that have nothing left to drop."""

from __future__ import annotations

import pytest

from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.cost.reach import drops_of, idle_line, reach_lines, reach_of
from tests.method.test_schedule import NANO_12B


def reduction(**keys: object) -> ReductionConfig:
    return ReductionConfig.of({"budget": 0.25, **keys})


def test_attention_layers_of_the_12b_model_drop_once() -> None:
    """Eight layers see everything before the first attention layer has run: 8 / 62 of the tokens are the least."""
    found = reach_of(reduction(), NANO_12B, "attention", 0.25)
    assert found.smallest == pytest.approx(8 / 62, abs=2e-4)
    assert found.drops == (7,)
    everywhere = reach_of(reduction(), NANO_12B, "all", 0.25)
    assert everywhere.smallest is not None
    assert everywhere.smallest < 0.02
    assert everywhere.drops is not None
    assert len(everywhere.drops) > 8
    assert {NANO_12B[layer] for layer in everywhere.drops} == {"M", "*"}


def test_a_budget_below_the_smallest_is_out_of_reach() -> None:
    assert reach_of(reduction(), NANO_12B, "attention", 0.1).drops is None
    assert reach_of(reduction(), "M-M-", "attention", 0.5).smallest is None


def test_drops_are_those_that_take_something() -> None:
    assert drops_of((1.0, 1.0, 0.5, 0.499, 0.2)) == (1, 3)


def test_idle_layers_are_named_in_one_line() -> None:
    line = idle_line(reduction(layers="attention"), NANO_12B, 0.25)
    assert line is not None
    assert "everything drops after layer 7, and the other 5 layers have nothing left to drop" in line
    assert "\n" not in line
    assert idle_line(reduction(), NANO_12B, 0.25) is None
    # One drop is what a step is.
    assert idle_line(reduction(schedule="step", layers="attention"), NANO_12B, 0.25) is None
    assert idle_line(reduction(budget=1.0), NANO_12B, 1.0) is None


def test_the_table_has_a_line_for_every_choice() -> None:
    lines = list(reach_lines(reduction(layers="attention"), NANO_12B, 0.25))
    assert [line.split()[0] for line in lines] == ["layers", "all", "mamba", "attention", "reduction.layers=attention:"]
    assert "1 drop after layer 7" in lines[3]
    listed = {"name": "listed", "retention": [1.0, 0.5, 0.5, 0.5]}
    assert not list(reach_lines(reduction(budget=0.625, schedule=listed), "M-M-", 0.625))
