"""The table and the picture of several methods on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hybridprune_megatron.evaluation.figure import interval_line, new_figure
from hybridprune_megatron.evaluation.intervals import Interval, bootstrap
from hybridprune_megatron.evaluation.judging import Outcome
from hybridprune_megatron.evaluation.report import percent

#: A method's outcomes by budget.
ByBudget = Mapping[float, Sequence[Outcome]]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREY = "#999999"


def method_rows(found: Mapping[str, ByBudget], every_token: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """What methods answer, and how far each is from the first, question by question; the first row is the header.

    Args:
        found: by method, at the same budgets, on the same questions; at least one.
        every_token: the same questions with nothing dropped.
    """
    first, budgets = next(iter(found)), list(next(iter(found.values())))
    rows: list[tuple[str, ...]] = [("budget", *(f"{budget:g}" for budget in budgets), "")]
    for title, right in _figures(every_token):
        count = len(_values(every_token, right))
        rows.append((title, *("" for _ in budgets), f"{count} questions; in brackets 95 % intervals"))
        whole = _cell(bootstrap(_values(every_token, right)))
        rows.append(("  every token", *(whole for _ in budgets), ""))
        for method, by_budget in found.items():
            cells = (_cell(bootstrap(_values(by_budget[budget], right))) for budget in budgets)
            rows.append((f"  {method}", *cells, ""))
        for method, by_budget in list(found.items())[1:]:
            apart = [_apart(found[first][budget], by_budget[budget], right) for budget in budgets]
            cells = (f"{100 * each.mean:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f})" for each in apart)
            rows.append((f"  {first} minus {method}", *cells, "points, paired"))
    return rows


def plot_methods(path: Path, found: Mapping[str, ByBudget], every_token: Sequence[Outcome]) -> None:
    """Writes one PNG: exact answers over the budget, a line for every method."""
    figure = new_figure(7, 4, dpi=120)
    axes = figure.subplots()
    for number, (method, by_budget) in enumerate(found.items()):
        budgets = sorted(by_budget)
        shares = [bootstrap(_values(by_budget[budget], _exact)) for budget in budgets]
        marker = "o" if number < len(_COLOURS) else "s"
        interval_line(axes, budgets, shares, _COLOURS[number % len(_COLOURS)], marker, method)
    whole = bootstrap(_values(every_token, _exact)).mean
    axes.axhline(whole, color=_GREY, linestyle=":", label="every token")
    axes.set(xlabel="budget: mean share of visual tokens over all layers", ylabel="exact match", ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{len(every_token)} questions; bars: 95 % bootstrap intervals over them", fontsize=10)
    figure.savefig(path, metadata={"Creator": "hybridprune evaluate"})


def _figures(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, Callable[[Outcome], bool | None]]]:
    yield "exact match", _exact
    if any(each.choice is not None for each in outcomes):
        yield "multiple choice", lambda outcome: outcome.choice_correct


def _exact(outcome: Outcome) -> bool | None:
    return outcome.correct


def _values(outcomes: Sequence[Outcome], right: Callable[[Outcome], bool | None]) -> np.ndarray:
    """[questions that can be judged], 1 where the answer is right."""
    judged = (right(each) for each in outcomes)
    return np.array([each for each in judged if each is not None], dtype=float)


def _apart(one: Sequence[Outcome], other: Sequence[Outcome], right: Callable[[Outcome], bool | None]) -> Interval:
    return bootstrap(_values(one, right) - _values(other, right))


def _cell(share: Interval) -> str:
    low, high = (percent(each).removesuffix(" %") for each in (share.low, share.high))
    return f"{percent(share.mean)} ({low} to {high})"
