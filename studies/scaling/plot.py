"""The picture of docs/scaling.md: step time and throughput over GPUs, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.scaling.report import REFERENCE, SIZES, Comparison

# Colour-blind safe (Okabe and Ito), as in the plots of runs.
_COLOURS = ("#999999", "#0072B2", "#D55E00")
_KINDS = {
    "linears": ("#0072B2", ("linears",)),
    "attention": ("#56B4E9", ("attention",)),
    "scan, norms, convolution": ("#009E73", ("scan", "norms, convolution")),
    "tower, projector": ("#E69F00", ("tower, projector", "wire: frames")),
    "tensor and context on the wire": ("#D55E00", ("wire: tensor", "wire: context")),
    "scores, dropping": ("#CC79A7", ("scoring, dropping", "wire: scores", "wire: drop")),
}
_REST = "#999999"


def plot_scaling(path: Path, compared: Comparison) -> None:
    """Writes one PNG: without reduction, with it, and with it where the tower's features are precomputed.

    Args:
        path: the file.
        compared: what was counted.
    """
    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    times, speeds, stack = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    budget = compared.reduced.workload.cfg.reduction.budget
    series = {
        "no reduction": compared.full,
        f"budget {budget:g}": compared.reduced,
        f"budget {budget:g},\nfeatures precomputed": compared.reduced.under(frames_over="features"),
    }
    found = {name: [scaling.fastest(gpus) for gpus in SIZES] for name, scaling in series.items()}
    for colour, (name, line) in zip(_COLOURS, found.items()):
        times.plot(SIZES, [each.step.seconds for each in line], "o-", color=colour, label=name)
        speeds.plot(SIZES, [each.tokens_per_second for each in line], "o-", color=colour, label=name)
    times.set(title=f"Seconds a step of {compared.full.batch} samples", xlabel="H100s", xscale="log", yscale="log")
    speeds.set(title="Tokens a second and GPU", xlabel="H100s", xscale="log")
    speeds.set_ylim(bottom=0)
    for axes in (times, speeds):
        axes.set_xticks(SIZES, [f"{gpus:,}" for gpus in SIZES])
        axes.minorticks_off()
    times.legend(frameon=False, fontsize=8, loc="lower left")
    at = SIZES.index(REFERENCE)
    bars = {f"{name}\n{line[at].layout}": line[at].step.parts for name, line in found.items()}
    left = [0.0] * len(bars)
    rest = {part for parts in bars.values() for part in parts}.difference(*(parts for _, parts in _KINDS.values()))
    for name, (colour, kinds) in {**_KINDS, "other": (_REST, tuple(rest))}.items():
        width = [sum(parts.get(part, 0.0) for part in kinds) for parts in bars.values()]
        stack.barh(list(bars), width, left=left, color=colour, label=name)
        left = [before + more for before, more in zip(left, width)]
    stack.invert_yaxis()
    stack.set(title=f"Where the seconds go on {REFERENCE} GPUs", xlabel="seconds a step")
    stack.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (times, speeds, stack):
        axes.spines[["top", "right"]].set_visible(False)
    model, tokens = compared.full.workload.cfg.model.name, compared.full.workload.prefill.prompt.tokens
    figure.suptitle(f"{model}, {tokens:,}-token samples, the fastest layout that fits (counted, not measured)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Creator": "scripts/scaling.py"})
