"""What ``hybridprune plan`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.memory import GIB, Memory
from hybridprune_megatron.cost.prefill import Operations, Prefill
from hybridprune_megatron.cost.reach import reach_lines
from hybridprune_megatron.cost.target import DEVICES
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import Cost, sum_costs

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.cost.plan import Plan
    from hybridprune_megatron.cost.target import Device, TargetConfig

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def layer_table(prefill: Prefill) -> Iterator[str]:
    """A line a layer: symbol, retention, kept tokens, operations without and with reduction, share of the latter."""
    scale, unit = flop_unit(max(sum_costs(row.full.values()).flops for row in prefill.rows))
    yield f"layer  {'':<9}  retention  kept tokens  {unit + ' full':>12}  {'reduced':>9}  {'share':>6}"
    total = prefill.reduced.flops
    for layer, row in enumerate(prefill.rows):
        full = sum_costs(row.full.values()).flops
        reduced = sum_costs([*row.reduced.values(), *row.scoring.values()]).flops
        yield (
            f"{layer:>5}  {row.symbol + ' ' + KINDS[row.symbol].label:<11}{row.retention:>9.4f}  {row.visual:>11,}  "
            f"{full / scale:>12.4f}  {reduced / scale:>9.4f}  {reduced / total:>6.1%}"
        )


def part_table(prefill: Prefill, device: Device, name: str, precision: str) -> Iterator[str]:
    """A line a part of the model: operations, bytes and roofline time, without and with reduction."""
    rows = prefill.rows
    yield (
        f"{'':<24}{'full':>12}{'reduced':>14}{'ratio':>8}{'GB full':>10}{'reduced':>10}"
        f"{f'ms on {name}':>14}{'reduced':>10}"
    )
    parts: list[tuple[str, Sequence[Cost], Sequence[Cost]]] = []
    for symbol in dict.fromkeys(row.symbol for row in rows):
        mine = [row for row in rows if row.symbol == symbol]
        title = f"{len(mine)} {KINDS[symbol].label} layers"
        parts.append((title, _flat(row.full for row in mine), _flat(row.reduced for row in mine)))
    parts.append(("embedding, head", _flat([prefill.ends_full]), _flat([prefill.ends_reduced])))
    scoring = _flat([*(row.scoring for row in rows), prefill.front])
    seconds = [(device.seconds(full, precision), device.seconds(reduced, precision)) for _, full, reduced in parts]
    # Scores are fp32 in every run.
    scoring_seconds = device.seconds(scoring, "fp32")
    for (title, full, reduced), times in zip(parts, seconds):
        yield _part_line(title, sum_costs(full), sum_costs(reduced), *times)
    yield _part_line("scoring, dropping", Cost(), sum_costs(scoring), 0.0, scoring_seconds)
    language = (sum(full for full, _ in seconds), sum(reduced for _, reduced in seconds) + scoring_seconds)
    yield _part_line("language model", prefill.full, prefill.reduced, *language)
    if prefill.vision:
        before = device.seconds(prefill.vision.values(), precision)
        yield _part_line("tower, projector", prefill.before, prefill.before, before, before)
        everything = (prefill.full + prefill.before, prefill.reduced + prefill.before)
        yield _part_line("everything", *everything, language[0] + before, language[1] + before)
    reduced_flops, reduced_bytes = prefill.reduced.flops, prefill.reduced.bytes
    yield (
        f"scoring and dropping: {prefill.scoring.flops / reduced_flops:.2%} of the language model's operations, "
        f"{prefill.scoring.bytes / reduced_bytes:.2%} of its bytes, {scoring_seconds / language[1]:.2%} of its time"
    )


def memory_lines(title: str, full: Memory, reduced: Memory) -> Iterator[str]:
    """Two lines on the fullest rank's peak."""
    for name, memory in (("full", full), ("reduced", reduced)):
        static = memory.static
        stage = f", pipeline stage {memory.stage}" if memory.stage else ""
        yield (
            f"{title}, {name:<8}{memory.total / GIB:>8.2f} GiB a rank{stage}: weights {static.weights / GIB:.2f}, "
            f"gradients {static.gradients / GIB:.2f}, optimizer {static.optimizer / GIB:.2f}, "
            f"kept {memory.kept / GIB:.2f}, working {memory.working / GIB:.2f} ({memory.moment})"
        )


def plan_lines(cfg: Config, target: TargetConfig, plan: Plan) -> Iterator[str]:
    """Everything about a plan; the last line is the override to paste."""
    prefill = plan.prefill
    yield heading(cfg, prefill)
    yield ""
    yield from layer_table(prefill)
    yield ""
    yield from part_table(prefill, DEVICES[target.device], target.device, cfg.trainer.precision)
    yield ""
    for kind, (full, reduced) in plan.memory.items():
        yield from memory_lines(kind, full, reduced)
    yield ""
    yield from reach_lines(cfg.reduction, cfg.model.hybrid_pattern, plan.budget)
    yield ""
    yield from _reached(target, plan)
    if cfg.model.vision is None:
        yield f"model {cfg.model.name} has no vision tower: this holds for its language model after one"
    yield f"reduction.budget={plan.budget:g}"


def _reached(target: TargetConfig, plan: Plan) -> Iterator[str]:
    """A line a target."""
    if target.speedup is not None:
        speedup = plan.prefill.speedup_with_vision if target.parts == "all" else plan.prefill.speedup
        what = "language model, tower and projector" if target.parts == "all" else "language model"
        yield f"target.speedup={target.speedup:g}: {speedup:.4f} ({what})"
    if target.memory_gib is not None:
        reduced = plan.memory[target.memory_of][1]
        yield f"target.memory_gib={target.memory_gib:g}: {reduced.total / GIB:.3f} GiB ({target.memory_of})"


def heading(cfg: Config, prefill: Prefill) -> str:
    """What is counted."""
    prompt, reduction = prefill.prompt, cfg.reduction
    video = f"{prompt.frames} frames = " if prompt.frames else ""
    layers = reduction.layers if isinstance(reduction.layers, str) else f"layers {reduction.layers}"
    return (
        f"{cfg.model.name}: one sample of {video}{prompt.visual:,} visual and {prompt.text:,} text tokens "
        f"({prompt.question} ask); score {reduction.score.name}, schedule {reduction.schedule.name} over {layers}"
    )


def _flat(pieces: Iterable[Operations]) -> list[Cost]:
    return [cost for piece in pieces for cost in piece.values()]


def _part_line(title: str, full: Cost, reduced: Cost, seconds: float, seconds_reduced: float) -> str:
    ratio = f"{full.flops / reduced.flops:.3f}" if full.flops and reduced.flops else ""
    return (
        f"{title:<24}{_flops(full.flops):>12}{_flops(reduced.flops):>14}{ratio:>8}{full.bytes / 1e9:>10.2f}"
        f"{reduced.bytes / 1e9:>10.2f}{seconds * 1e3:>14.2f}{seconds_reduced * 1e3:>10.2f}"
    )


def flop_unit(flops: float) -> tuple[float, str]:
    """The unit that shows a number of operations well, and its size."""
    return next((each for each in _UNITS if flops >= each[0]), _UNITS[-1])


def _flops(flops: float) -> str:
    scale, unit = flop_unit(flops)
    return f"{flops / scale:.3f} {unit}" if flops else "0"
