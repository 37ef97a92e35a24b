"""A validation finds the same figures under every layout and setting, and leaves nothing behind."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hybridprune_megatron.method.schedule import cut_pattern, even_edges
from tests.parallel.run import PATTERN, SHARING, write_weights
from tests.parallel.test_experts import EXPERTS, LAYERS
from tests.parallel.validate import BROKEN, FRAMES, both_ways, figures, likeliest, several
from tests.worlds import run_world

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2+SP": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    # One replica has a packed sequence more than the other.
    "DP4": {"data": 4},
    # As many micro-batches as stages at once.
    "PP2 VP2": {"pipeline": 2, "virtual_pipeline": 2},
    "PP2 DP2": {"pipeline": 2, "data": 2},
}


@pytest.fixture(scope="module")
def answers(weights: str) -> dict[int, list[int]]:
    return run_world(1, likeliest, weights, [])[0]


@pytest.fixture(scope="module")
def alone(weights: str, answers: dict[int, list[int]]) -> dict[str, float]:
    return run_world(1, figures, weights, {}, [], answers)[0]


def assert_same(found: dict[str, float], expected: dict[str, float], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel), name


def test_the_reference_says_something(alone: dict[str, float]) -> None:
    assert sorted(alone) == ["accuracy", "accuracy_full", "loss", "loss_full", "samples"]
    assert alone["samples"] == len(FRAMES) - len(BROKEN)
    # Of seven samples with a known answer, those with an even number were given the model's own.
    assert alone["accuracy"] == pytest.approx(4 / 7)
    assert alone["accuracy_full"] < alone["accuracy"]
    assert abs(alone["loss"] - alone["loss_full"]) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_finds_what_one_process_finds(
    weights: str, answers: dict[int, list[int]], alone: dict[str, float], layout: str
) -> None:
    sizes = LAYOUTS[layout]
    processes = math.prod(size for name, size in sizes.items() if name not in SHARING)
    stages = sizes.get("pipeline", 1) * sizes.get("virtual_pipeline", 1)
    pattern = cut_pattern(PATTERN, even_edges(len(PATTERN), stages))
    ranks = run_world(processes, figures, weights, sizes, [], answers, pattern)
    assert all(found == ranks[0] for found in ranks)
    assert_same(ranks[0], alone)


def test_experts_that_replicas_share_see_as_many_passes_everywhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("experts") / "model.safetensors")
    run_world(1, write_weights, path, [EXPERTS], LAYERS)
    whole: Any = run_world(1, figures, path, {}, [EXPERTS], {}, LAYERS)[0]
    for found in run_world(2, figures, path, {"data": 2, "expert": 2}, [EXPERTS], {}, LAYERS):
        assert_same(found, whole)


SETTINGS = {
    "selective": ["trainer.recompute=selective"],
    "full": ["trainer.recompute=full"],
    "adapters": ["tuning=lora", "tuning.lora.dropout=0.5", "model.trainable.projector=true"],
    "a teacher": ["tuning.distillation.weight=0.5", "tuning.distillation.teacher=self"],
}

#: A schedule that any budget has, and budgets drawn for training.
SOLVED = ["reduction.schedule=linear"]
DRAWN = ["tuning.budget.distribution=uniform", "tuning.budget.low=0.25"]


def test_how_it_is_trained_does_not_matter(
    weights: str, answers: dict[int, list[int]], alone: dict[str, float]
) -> None:
    settings = [*SETTINGS.values(), SOLVED, [*SOLVED, *DRAWN], ["trainer.precision=bf16"]]
    *found, solved, drawn, rounded = run_world(1, several, weights, settings, answers)[0]
    for each in found:
        assert_same(each, alone, rel=1e-6)
    # At the configured budget, whatever training draws.
    assert drawn == solved
    assert solved["loss"] != alone["loss"]
    assert rounded["loss"] == pytest.approx(alone["loss"], rel=0.02)


def test_its_accuracy_is_that_of_an_evaluation(weights: str, answers: dict[int, list[int]]) -> None:
    found, accuracies = run_world(1, both_ways, weights, answers)[0]
    assert [found["accuracy"], found["accuracy_full"]] == pytest.approx(accuracies)
    assert len({*accuracies}) == 2
