"""The tables of docs/scaling.md, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.cost.memory import GIB
from studies.scaling.assumptions import Assumptions
from studies.scaling.scaling import LAYOUTS, Estimate, Layout, Scaling

SIZES = (8, 64, 512, 4096)
REFERENCE = 512
# Other assumptions, one at a time.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as assumed", {}),
    ("only context ranks divide the frames", {"frames_over": "context"}),
    ("the tower's features are precomputed", {"frames_over": "features"}),
    ("linears in FP8", {"fp8": True}),
    ("linears reach 0.5 of the peak", {"linear": 0.5}),
    ("linears reach 0.8 of the peak", {"linear": 0.8}),
    ("the scan reaches 0.05 of the peak", {"scan": 0.05}),
    ("collectives half as fast", {"wire": 0.4}),
    ("no communication is overlapped", {"overlap": 0.0}),
)


class Comparison:
    """One workload without and with reduction, on the same machines.

    Args:
        full: without.
        reduced: with.
    """

    def __init__(self, full: Scaling, reduced: Scaling) -> None:
        self.full, self.reduced = full, reduced

    def fastest(self, gpus: int) -> tuple[Estimate, Estimate]:
        """Without and with."""
        return self.full.fastest(gpus), self.reduced.fastest(gpus)

    def best(self, layout: Layout, gpus: int) -> tuple[Estimate, Estimate]:
        """One layout without and with.

        Raises:
            ConfigError: it cannot be run.
        """
        return self.full.best(layout, gpus), self.reduced.best(layout, gpus)


def report(compared: Comparison) -> Iterator[str]:
    """All tables."""
    cfg, prompt = compared.reduced.workload.cfg, compared.full.workload.prefill.prompt
    budget = cfg.reduction.budget
    yield (
        f"{cfg.model.name}: samples of {prompt.tokens:,} tokens ({prompt.frames} frames = {prompt.visual:,} visual "
        f"tokens, {prompt.text:,} of text, {prompt.question} of them ask), {compared.full.batch} a step. Reduction at "
        f"{budget:g} of the visual tokens (mean over all layers), score {cfg.reduction.score.name}."
    )
    yield from _section("The fastest layout that fits", headline(compared))
    for gpus in SIZES:
        yield from _section(f"{gpus:,} GPUs", layouts(compared, gpus))
    full, reduced = compared.fastest(REFERENCE)
    shown = {f"none, {full.layout}": full, f"{budget:g}, {reduced.layout}": reduced}
    for title, each in zip(("none", f"{budget:g}"), compared.best(Layout(8), REFERENCE)):
        shown[f"{title}, {each.layout}"] = each
    yield from _section(f"Where a step's seconds go on {REFERENCE} GPUs", parts(shown))
    yield from _section(f"GB that a GPU sends in a step on {REFERENCE} GPUs", wires(shown))
    yield from _section(f"Other assumptions, {REFERENCE} GPUs", variants(compared))
    yield from _section("Assumptions", assumption_rows(compared.full.assumptions))


def headline(compared: Comparison) -> Iterator[str]:
    """The fastest layout for every number of GPUs."""
    yield "| GPUs | without: layout | step s | tokens/s/GPU | with: layout | step s | tokens/s/GPU | faster |"
    yield "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |"
    for gpus in SIZES:
        yield f"| {gpus:,} | {_fastest_cells(*compared.fastest(gpus))} |"


def layouts(compared: Comparison, gpus: int) -> Iterator[str]:
    """All layouts on some GPUs: recomputation, memory, bytes, time."""
    yield (
        "| layout | copies | without: recompute | GiB | GB sent in, out of node | step s | tokens/s/GPU "
        "| with: recompute | GiB | GB sent in, out of node | step s | tokens/s/GPU | faster |"
    )
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for layout in LAYOUTS:
        if layout.gpus > gpus:
            continue
        start = f"| {layout} | {gpus // layout.gpus} |"
        try:
            full, reduced = compared.best(layout, gpus)
        except ConfigError as error:
            yield f"{start} refused: {error} |{' |' * 10}"
            continue
        faster = f"{full.step.seconds / reduced.step.seconds:.2f}" if full.fits and reduced.fits else ""
        yield f"{start} {_cells(full)} | {_cells(reduced)} | {faster} |"


def parts(shown: Mapping[str, Estimate]) -> Iterator[str]:
    """Seconds of a step by what they go to."""
    yield from _by_kind({name: each.step.parts for name, each in shown.items()}, lambda value: f"{value:.2f}")


def wires(shown: Mapping[str, Estimate]) -> Iterator[str]:
    """Bytes by what they are, in and out of the node."""
    columns = {}
    for name, each in shown.items():
        columns[name] = {
            f"{kind}, {where}": size
            for where, sums in (("in the node", each.step.near), ("out of it", each.step.far))
            for kind, size in sums.items()
            if size
        }
    yield from _by_kind(columns, _gb)


def variants(compared: Comparison) -> Iterator[str]:
    """The fastest layout under other assumptions."""
    yield "| | without: layout | step s | tokens/s/GPU | with: layout | step s | tokens/s/GPU | faster |"
    yield "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |"
    for name, changes in VARIANTS:
        other = Comparison(compared.full.under(**changes), compared.reduced.under(**changes))
        yield f"| {name} | {_fastest_cells(*other.fastest(REFERENCE))} |"


def assumption_rows(assumptions: Assumptions) -> Iterator[str]:
    """Every assumption with its source."""
    yield "| name | value | what | source |"
    yield "| --- | --- | --- | --- |"
    for row in assumptions.rows():
        yield f"| {' | '.join(row)} |"


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield from ("", f"### {title}", "", *lines)


def _cells(each: Estimate) -> str:
    step, gib = each.step, each.memory.total / GIB
    memory = f"{gib:.1f}" if each.fits else f"**{gib:.1f}, does not fit**"
    sent = f"{_gb(sum(step.near.values()))}, {_gb(sum(step.far.values()))}"
    return f"{each.cfg.trainer.recompute} | {memory} | {sent} | {_speed(each)}"


def _fastest_cells(full: Estimate, reduced: Estimate) -> str:
    cells = [f"{each.layout}, recompute {each.cfg.trainer.recompute} | {_speed(each)}" for each in (full, reduced)]
    return f"{' | '.join(cells)} | {full.step.seconds / reduced.step.seconds:.2f}"


def _speed(each: Estimate) -> str:
    return f"{each.step.seconds:,.2f} | {each.tokens_per_second:,.0f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 100e9 else f"{size / 1e9:.1f}"


def _by_kind(columns: Mapping[str, Mapping[str, float]], words: Callable[[float], str]) -> Iterator[str]:
    """A table with a row a kind and the sum below."""
    yield f"| | {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for kind in dict.fromkeys(kind for column in columns.values() for kind in column):
        cells = [words(column[kind]) if kind in column else "" for column in columns.values()]
        yield f"| {kind} | {' | '.join(cells)} |"
    yield f"| total | {' | '.join(words(sum(column.values())) for column in columns.values())} |"
