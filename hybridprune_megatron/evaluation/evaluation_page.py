"""The table, the picture and the files of an evaluation over budgets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridprune_megatron.evaluation.figure import interval_line, new_figure
from hybridprune_megatron.evaluation.intervals import Interval
from hybridprune_megatron.evaluation.judging import Figures, Outcome, Share
from hybridprune_megatron.evaluation.report import percent

_EXACT, _CHOICE, _LOSS, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
#: Whom the picture names as its maker.
_COMMAND = "hybridprune evaluate"


def table_rows(found: Mapping[str, Figures], budgets: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The figures in rows, a column for every budget; the first row is the header.

    Args:
        found: by the name of the column, on the same questions; at least one.
        budgets: of the columns.
    """
    first, *_ = found.values()
    chance = "" if first.chance is None else f"chance {percent(first.chance)}"
    samples = f"{first.samples} questions"
    everywhere = first.choice is not None and first.choice.samples == first.samples
    by_budget = list(budgets) == [f"{budget:g}" for budget in budgets.values()]
    rows: list[tuple[str, ...]] = [("budget" if by_budget else "", *found, "")]
    remark = f"{samples}, {chance}" if everywhere else samples
    rows += _share_rows("exact match", remark, [each.exact for each in found.values()])
    shares = [each.choice for each in found.values() if each.choice is not None]
    if shares:
        which = "" if everywhere else f" of {shares[0].samples} questions"
        rows += _share_rows("multiple choice", f"likeliest of the choices{which}, {chance}", shares)
    rows += [
        ("loss", *(f"{each.loss.mean:.4f}" for each in found.values()), "nats per token of the answers"),
        ("  95 % interval", *(_span(each.loss, _number) for each in found.values()), ""),
    ]
    kept = (percent(each.retention.mean) for each in found.values())
    asked = "" if by_budget else f"; budget {min(budgets.values()):g}"
    return [*rows, ("visual tokens kept", *kept, f"mean over layers{asked}")]


def _share_rows(name: str, remark: str, shares: Sequence[Share]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (name, *(percent(each.all.mean) for each in shares), remark),
        ("  95 % interval", *(_span(each.all, percent) for each in shares), ""),
    ]
    for kind in shares[0].by_kind:
        rows.append((f"  {kind}", *(percent(each.by_kind[kind].mean) for each in shares), ""))
    return rows


def _span(interval: Interval, words: Callable[[float], str]) -> str:
    return f"{words(interval.low).removesuffix(' %')} to {words(interval.high)}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def write_evaluation(
    folder: Path,
    outcomes: Mapping[str, Sequence[Outcome]],
    found: Mapping[str, Figures],
    budgets: Mapping[str, float],
    about: Mapping[str, Any],
    table: str,
    plot: Callable[[Path], None],
) -> None:
    """Writes evaluation.json, table.txt, predictions.jsonl and, over several columns, evaluation.png.

    Args:
        folder: is there.
        outcomes, found, budgets: by the name of the column.
        about: what evaluation.json says besides the figures.
        table: text of table.txt.
        plot: draws the picture.
    """
    columns = [{"name": name, "budget": budgets[name]} | asdict(each) for name, each in found.items()]
    report = json.dumps({**about, "columns": columns}, indent=1, ensure_ascii=False)
    (folder / "evaluation.json").write_text(f"{report}\n", encoding="utf-8")
    (folder / "table.txt").write_text(f"{table}\n", encoding="utf-8")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for name, each in outcomes.items():
            for outcome in each:
                file.write(json.dumps({"column": name} | outcome.row(budgets[name]), ensure_ascii=False) + "\n")
    if len(found) > 1:
        plot(folder / "evaluation.png")


def plot_budgets(path: Path, found: Mapping[str, Figures], budgets: Mapping[str, float]) -> None:
    """Writes one PNG: right answers and loss over the budget, with their intervals."""
    figure = new_figure(10, 4, dpi=120)
    left, right = figure.subplots(1, 2)
    names = sorted(found, key=lambda name: budgets[name])
    ordered, at = [found[name] for name in names], [budgets[name] for name in names]
    interval_line(left, at, [each.exact.all for each in ordered], _EXACT, "o", "exact match")
    chosen = [each.choice.all for each in ordered if each.choice is not None]
    if chosen:
        interval_line(left, at, chosen, _CHOICE, "s", "multiple choice")
        chance = ordered[0].chance
        assert chance is not None, "choices without a chance"
        left.axhline(chance, color=_GREY, linestyle=":", linewidth=1, label="chance")
    left.set(title="Right answers", ylabel="share", ylim=(0, 1.02))
    interval_line(right, at, [each.loss for each in ordered], _LOSS, "o", "loss")
    right.set(title="Loss", ylabel="nats per token of the answers", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("budget: mean share of visual tokens over all layers")
        axes.set_xticks(at, [f"{budget:g}" for budget in at])
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(f"{ordered[0].samples} questions; bars: 95 % bootstrap intervals over them", fontsize=10)
    figure.savefig(path, metadata={"Creator": _COMMAND})
