"""What each choice of layers can reach: the smallest budget, and how many drops a budget becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.plan import smallest_budget
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.schedule import Listed, Step, dropping_layers, reducing_layers

if TYPE_CHECKING:
    from hybridprune_megatron.config.reduction_schema import ReductionConfig

#: A layer that drops less than this share of the tokens that enter it does not count as a drop.
LEAST_DROP = 0.01


@dataclass(frozen=True)
class Reach:
    """One choice of layers.

    Attributes:
        layers: as ``reduction.layers`` writes it.
        smallest: the smallest budget that has a schedule; None: these layers cannot drop.
        drops: layers after which tokens go at the budget asked for; None: it is out of reach.
        last: share of the visual tokens that the last layer gets there.
    """

    layers: str
    smallest: float | None
    drops: tuple[int, ...] | None
    last: float


def drops_of(retention: tuple[float, ...]) -> tuple[int, ...]:
    """Layers, 0-based, after which at least ``LEAST_DROP`` of what entered them goes."""
    return tuple(
        layer for layer in range(len(retention) - 1) if retention[layer + 1] < retention[layer] * (1 - LEAST_DROP)
    )


def reach_of(reduction: ReductionConfig, pattern: str, layers: str, budget: float) -> Reach:
    """What the configured schedule can do in some layers.

    Args:
        reduction: its schedule and front; a listed schedule names its layers itself.
        pattern: hybrid layer pattern.
        layers: "all" or the name of a kind of layer.
        budget: mean retention.
    """
    if not reducing_layers(pattern, layers):
        return Reach(layers, None, None, 1.0)
    chosen = replace(reduction, layers=layers)

    def retention_at(each: float) -> tuple[float, ...]:
        return replace(chosen, budget=each).retention(pattern)

    smallest = smallest_budget(retention_at, reduction.front.retention)
    if smallest > budget:
        return Reach(layers, smallest, None, 1.0)
    retention = retention_at(budget)
    return Reach(layers, smallest, drops_of(retention), retention[-1])


def reach_lines(reduction: ReductionConfig, pattern: str, budget: float) -> Iterator[str]:
    """A table of the choices, and a line where the configured layers have nothing left to drop."""
    if isinstance(reduction.schedule, Listed) or budget >= 1:
        return
    words = ["all", *(kind.name for kind in KINDS.values() if kind.scores)]
    yield f"layers      smallest budget  at {budget:g}, {reduction.schedule.name}"
    for word in words:
        found = reach_of(reduction, pattern, word, budget)
        if found.smallest is None:
            yield f"{word:<10}  {'none drops':>15}"
        elif found.drops is None:
            yield f"{word:<10}  {found.smallest:>15.4f}  out of reach"
        else:
            yield f"{word:<10}  {found.smallest:>15.4f}  {_shape(found)}"
    warning = idle_line(reduction, pattern, budget)
    if warning:
        yield warning


def idle_line(reduction: ReductionConfig, pattern: str, budget: float) -> str | None:
    """One line if a falling schedule over several layers has become a single drop; None: it has not."""
    if budget >= 1 or isinstance(reduction.schedule, Step | Listed):
        return None
    able = dropping_layers(pattern, reduction.layers)
    drops = drops_of(replace(reduction, budget=budget).retention(pattern))
    if len(able) < 2 or len(drops) != 1:
        return None
    return (
        f"reduction.layers={reduction.layers}: at a budget of {budget:g} everything drops after layer {drops[0]}, and "
        f"the other {len(able) - 1} layers have nothing left to drop; name earlier layers, or raise reduction.budget"
    )


def _shape(found: Reach) -> str:
    assert found.drops is not None
    count = len(found.drops)
    if not count:
        return "no drop"
    where = f"after layer {found.drops[0]}" if count == 1 else f"after layers {found.drops[0]} to {found.drops[-1]}"
    return f"{count} drop{'s' * (count > 1)} {where}, {found.last:.3f} left at the end"
