"""What the study measures and in which order."""

from __future__ import annotations

from typing import Any

from studies.needles.cells import (
    ABLATIONS,
    BUDGETS,
    HEADLINE,
    METHODS,
    OURS,
    SEEDS,
    Unit,
    rows_of,
    strongest_baselines,
    units,
)


def row(stage: str, method: str, accuracy: float, seed: int = 0, budget: float = HEADLINE) -> dict[str, Any]:
    key = Unit(stage, method, seed, (budget,)).key(budget)
    return {"key": key, "stage": stage, "method": method, "budget": budget, "seed": seed, "accuracy": accuracy}


def test_every_method_is_measured_at_every_budget_before_and_after() -> None:
    keys = {unit.key(budget) for unit in units({}) for budget in unit.budgets}
    for method in METHODS:
        for stage in ("before", method.tuned_stage):
            for budget in (HEADLINE,) if method.headline_only else BUDGETS:
                assert f"{stage}/{method.name}/{budget:g}/0" in keys
    for seed in SEEDS:
        assert f"after/{OURS}/0.25/{seed}" in keys
        assert f"after_fixed/{OURS}/0.25/{seed}" in keys


def test_the_headline_budget_comes_first() -> None:
    order = list(units({}))
    assert order[0] == Unit("before", "none", 0, (1.0,))
    compared = [unit for unit in order if unit.stage == "after_fixed" and unit.budgets == (HEADLINE,)]
    first_full = min(place for place, unit in enumerate(order) if unit.budgets == BUDGETS)
    before = {unit.method for unit in order[:first_full]}
    assert {method.name for method in METHODS} <= before
    assert len([unit for unit in compared if unit in order[:first_full]]) > 10


def test_the_strongest_baselines_and_ablations_get_all_seeds() -> None:
    rows = [row("before", "random", 0.9), row("before", "uniform", 0.5), row("before", "evs", 0.6)]
    # Finetuned accuracy counts where it is known; variants of ours are no baselines.
    rows += [row("after_fixed", "random", 0.1), row("after_fixed", OURS, 1.0), row("after_fixed", "query", 1.0)]
    by_key = {each["key"]: each for each in rows}
    assert strongest_baselines(by_key) == ["evs", "uniform"]
    seeded = {unit.method for unit in units(by_key) if unit.stage == "after_fixed" and unit.seed == 2}
    assert seeded == {OURS, "none", *ABLATIONS, "evs", "uniform"}
    # What it is all compared with keeps every token.
    assert Unit("after_fixed", "none", 2, (1.0,)) in list(units(by_key))


def test_rows_of_a_cell_come_by_seed() -> None:
    rows = [row("after", OURS, 0.5, seed=2), row("after", OURS, 0.6, seed=0), row("before", OURS, 0.1)]
    assert [each["seed"] for each in rows_of(rows, "after", OURS, HEADLINE)] == [0, 2]


def test_a_unit_lacks_the_budgets_without_a_row() -> None:
    unit = Unit("after", OURS, 1, BUDGETS)
    rows = {unit.key(0.5): {}}
    assert unit.missing(rows) == tuple(budget for budget in BUDGETS if budget != 0.5)
    assert unit.weights == f"after-{OURS}-1"
    assert Unit("before", OURS, 0, BUDGETS).weights == ""
