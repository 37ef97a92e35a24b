"""Seconds of a training step: a roofline at stated utilisation, communication as far as nothing hides it, the bubble.

Backward takes twice the operations and bytes of forward (attention as assumed), and what is recomputed once more. Every
rank of a stage has the same share of the work: context parallelism by zigzag, data parallelism
by sequences of one length. Products of small shards are taken to be as well used as large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.memory import Stage, StaticMemory
from hybridprune_megatron.cost.parameters import projector_parameters, tower_parameters
from hybridprune_megatron.cost.vision import projector_cost, tower_operations
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import WIDTH, Cost
from studies.scaling.communication import Transfer, Wires

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.cost.prefill import Prefill
    from studies.scaling.assumptions import Assumptions

_LINEARS = {"in_proj", "out_proj", "qkv", "fc1", "fc2", "patches", "projector"} | {
    "router",
    "to_latent",
    "from_latent",
    *(f"{kind}_{name}" for kind in ("routed", "shared") for name in ("fc1", "fc2")),
}
# What a rank does whatever the others do: rank every visual token, and copy the rows of its context shard.
_WHOLE, _BY_CONTEXT = {"rank", "smooth"}, {"take", "merge", "match", "importance"}
_BACKWARD = 2


class Sums(dict[str, float]):
    """Numbers by name; one that is missing is 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, more: Mapping[str, float]) -> None:
        """Adds name by name."""
        for name, value in more.items():
            self[name] += value

    def total(self) -> float:
        """The sum of all."""
        return sum(self.values())


@dataclass(frozen=True)
class Work:
    """Part of one micro-batch on one rank, by what it goes to.

    Attributes:
        forward: seconds of the forward pass.
        backward: seconds of the backward pass, recomputation included.
        near: bytes that a rank sends within its node.
        far: bytes that it sends to other nodes.
    """

    forward: Sums = field(default_factory=Sums)
    backward: Sums = field(default_factory=Sums)
    near: Sums = field(default_factory=Sums)
    far: Sums = field(default_factory=Sums)

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward.total() + self.backward.total()


def together(pieces: Iterable[Work]) -> Work:
    """The sum of some pieces."""
    total = Work()
    for piece in pieces:
        for name, sums in vars(total).items():
            sums.add(getattr(piece, name))
    return total


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        parts: seconds of the busiest stage by what they go to, with the bubble, gradients and the optimizer.
        near: bytes by what they are that a rank of the stage that sends most sends within its node.
        far: bytes that it sends to other nodes.
    """

    parts: Mapping[str, float]
    near: Mapping[str, float]
    far: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def step_time(cfg: Config, clock: Clock) -> StepTime:
    """A whole step, one-forward-one-backward: every stage once, and the busiest once more for every further batch.

    Args:
        cfg: stage cuts, data parallelism and batch are read.
        clock: of the same tensor and context parallelism and recomputation.
    """
    batches = cfg.num_micro_batches
    stages = [_stage(cfg, clock, index) for index in range(len(cfg.model.stages))]
    busiest = max(stages, key=lambda stage: stage.seconds)
    parts = Sums()
    for name, seconds in (*busiest.forward.items(), *busiest.backward.items()):
        parts[name] += batches * seconds
    parts["bubble"] = sum(stage.seconds for stage in stages) - busiest.seconds
    updates, sent = [], []
    for index, stage in enumerate(stages):
        static = Stage(cfg, index).static()
        once = Wires(cfg, clock.width).step(static.gradients, 0 if index else _frame_gradients(cfg))
        updates.append(_update(cfg, clock, static, stage, once))
        near, far = (Sums({name: batches * size for name, size in sums.items()}) for sums in (stage.near, stage.far))
        for transfer in once:
            near[transfer.what] += transfer.near
            far[transfer.what] += transfer.far
        sent.append((near, far))
    longest = max(updates, key=Sums.total)
    parts.add(longest)
    most = max(sent, key=lambda pair: pair[0].total() + pair[1].total())
    return StepTime({name: value for name, value in parts.items() if value}, *most)


def _stage(cfg: Config, clock: Clock, index: int) -> Work:
    """One micro-batch on one pipeline stage."""
    stages, wires = cfg.model.stages, Wires(cfg, clock.width)
    first = sum(len(stage) for stage in stages[:index])
    last = first + len(stages[index])
    pieces = clock.layers[first:last]
    if index == 0:
        pieces.append(clock.frames)
    else:
        pieces.append(clock.work(transfers=wires.cut(clock.tokens[first], "backward")))
    if index == len(stages) - 1:
        pieces.append(clock.work(transfers=wires.head(clock.tokens[-1])))
    else:
        pieces.append(clock.work(transfers=wires.cut(clock.tokens[last], "forward")))
    return together(pieces)


def _frame_gradients(cfg: Config) -> int:
    """Bytes of the fp32 gradients of tower and projector."""
    vision, learns = cfg.model.vision, cfg.model.trainable
    if vision is None:
        return 0
    tower, projector = tower_parameters(vision), projector_parameters(vision, cfg.model.hidden_size)
    return WIDTH["fp32"] * (learns.vision * tower.total + learns.projector * projector.total)


def _update(cfg: Config, clock: Clock, static: StaticMemory, stage: Work, transfers: Iterable[Transfer]) -> Sums:
    """What comes once a step: gradients and parameters, beside a micro-batch's work if so configured, and Adam."""
    parallel, seconds = cfg.parallel, Sums()
    beside = {
        "gradients": (parallel.overlap_grad_reduce, stage.backward),
        "parameters": (parallel.overlap_param_gather, stage.forward),
    }
    for transfer in transfers:
        overlaps, work = beside.get(transfer.what, (False, stage.backward))
        computing = sum(value for name, value in work.items() if not name.startswith("wire"))
        room = clock.assumptions.overlap * computing if overlaps else 0.0
        seconds[f"wire: {transfer.what}"] += max(0.0, clock.wire(transfer) - room)
    # States are read and written, gradients read and cleared, weights written.
    traffic = 2 * static.optimizer + 2 * static.gradients + static.weights
    seconds["optimizer"] = traffic / clock.memory
    return seconds


class Clock:
    """Times the pieces of a micro-batch; stage cuts and data parallelism do not matter to them.

    Args:
        cfg: tensor and context parallelism, node size and recomputation are read.
        prefill: the operations of one sequence; with budget 1 nothing is reduced.
        assumptions: machines and utilisation.
    """

    def __init__(self, cfg: Config, prefill: Prefill, assumptions: Assumptions) -> None:
        self.cfg, self.prefill, self.assumptions = cfg, prefill, assumptions
        self.width = WIDTH[cfg.trainer.precision]
        self.wires = Wires(cfg, self.width)
        self.ranks = cfg.parallel.tensor * cfg.parallel.context
        self.tokens = [row.visual + prefill.prompt.text for row in prefill.rows]
        peak = assumptions.device.flops[cfg.trainer.precision]
        self.rates = {"attention": peak * assumptions.attention, "scan": peak * assumptions.scan}
        self.linear = peak * assumptions.linear
        self.language_linear = assumptions.fp8_flops * assumptions.fp8_linear if assumptions.fp8 else self.linear
        self.fp32 = assumptions.device.flops["fp32"] * assumptions.linear
        self.memory = assumptions.device.bytes * assumptions.bandwidth

    @cached_property
    def layers(self) -> list[Work]:
        """Every layer with the reduction after it."""
        layers, known = [], dict[tuple[str, int], Work]()
        for layer, (row, tokens) in enumerate(zip(self.prefill.rows, self.tokens)):
            # Without a reduction after them, layers of a kind and length are alike.
            work = None if row.scoring else known.get((row.symbol, tokens))
            work = work or self._layer(layer)
            if not row.scoring:
                known[row.symbol, tokens] = work
            layers.append(work)
        return layers

    def _layer(self, layer: int) -> Work:
        row = self.prefill.rows[layer]
        transfers = self.wires.layer(row.symbol, self.tokens[layer])
        forward = self._operations(row.reduced, 1)
        backward = self._operations(row.reduced, _BACKWARD)
        again, sent_again = _again(self.cfg.trainer.recompute, row.symbol, row.reduced)
        backward.add(self._operations(again, 1))
        transfers += [
            replace(each, phase="backward") for each in transfers if each.phase == "forward" and each.what in sent_again
        ]
        if row.scoring:
            question = self.cfg.reduction.score.rows(self.prefill.prompt.question)
            after = self.tokens[layer + 1]
            transfers += self.wires.reduction(row.symbol, self.tokens[layer], after, row.visual, question)
            forward["scoring, dropping"] = self._scoring(row.scoring)
            # The gradient of a copy is a copy.
            backward["scoring, dropping"] = self._scoring({"take": row.scoring["take"]})
        return self.work(forward, backward, transfers)

    @cached_property
    def frames(self) -> Work:
        """Tower, projector and embedding on the first stage; nothing without frames."""
        prompt, vision, learns = self.prefill.prompt, self.cfg.model.vision, self.cfg.model.trainable
        if vision is None or not prompt.frames:
            return self.work(transfers=self.wires.frames(prompt.tokens, 0, self.wires.context))
        sharers = self.wires.heads if self.assumptions.frames_over == "model" else self.wires.context
        frames = -(-prompt.frames // sharers.ranks)
        tower: Mapping[str, Cost] = {}
        if self.assumptions.frames_over != "features":
            tower = tower_operations(vision, frames, self.width)
        projector = {"projector": projector_cost(vision, self.cfg.model.hidden_size, frames, self.width)}
        once = self._time(tower, 1) + self._time(projector, 1)
        twice = learns.vision * self._time(tower, _BACKWARD) + learns.projector * self._time(projector, _BACKWARD)
        transfers = self.wires.frames(prompt.tokens, prompt.visual, sharers)
        return self.work(Sums({"tower, projector": once}), Sums({"tower, projector": twice}), transfers)

    def work(
        self, forward: Sums | None = None, backward: Sums | None = None, transfers: Sequence[Transfer] = ()
    ) -> Work:
        """Work with its transfers, and the time of these that nothing hides."""
        work = Work(forward or Sums(), backward or Sums())
        room = self.assumptions.overlap * work.backward["linears"]
        for transfer in transfers:
            work.near[transfer.what] += transfer.near
            work.far[transfer.what] += transfer.far
            seconds = self.wire(transfer)
            if transfer.hidden:
                hidden = min(seconds, room)
                room -= hidden
                seconds -= hidden
            passed = work.forward if transfer.phase == "forward" else work.backward
            passed[f"wire: {transfer.what}"] += seconds
        return work

    def wire(self, transfer: Transfer) -> float:
        """Seconds of one transfer with nothing beside it."""
        machines = self.assumptions
        return transfer.seconds(machines.nvlink * machines.wire, machines.network * machines.wire, machines.hop)

    def _operations(self, operations: Mapping[str, Cost], times: int) -> Sums:
        """A layer's operations by kind on one rank: forward once, backward twice."""
        seconds = Sums()
        for name, cost in operations.items():
            kind = "linears" if name in _LINEARS else name if name in self.rates else "norms, convolution"
            rate = self.language_linear if name in _LINEARS else self.rates.get(name, self.linear)
            seconds[kind] += self._one(name, cost, times, rate) / self.ranks
        return seconds

    def _time(self, operations: Mapping[str, Cost], times: int) -> float:
        """Tower and projector, which a rank runs whole on its frames."""
        return sum(self._one(name, cost, times, self.rates.get(name, self.linear)) for name, cost in operations.items())

    def _one(self, name: str, cost: Cost, times: int, rate: float) -> float:
        more = self.assumptions.attention_backward if name == "attention" and times == _BACKWARD else times
        return max(more * cost.flops / rate, times * cost.bytes / self.memory)

    def _scoring(self, operations: Mapping[str, Cost]) -> float:
        """Scores are fp32 and shared by all ranks; rows are copied by every tensor rank, plans made by every rank."""
        seconds = 0.0
        for name, cost in operations.items():
            share = 1 if name in _WHOLE else self.cfg.parallel.context if name in _BY_CONTEXT else self.ranks
            seconds += max(cost.flops / self.fp32, cost.bytes / self.memory) / share
        return seconds


def _again(recompute: str, symbol: str, operations: Mapping[str, Cost]) -> tuple[Mapping[str, Cost], set[str]]:
    """What backward computes again of a layer, and what it sends again."""
    if recompute == "full":
        return operations, {"tensor", "context", "experts"}
    if recompute == "none":
        return {}, set()
    kind = KINDS[symbol]
    # Mamba's exchanges lie outside of its core, the gathered keys and values inside of attention's.
    again = {"context"} if kind.name == "attention" else set()
    return {name: cost for name, cost in operations.items() if name in kind.core}, again
