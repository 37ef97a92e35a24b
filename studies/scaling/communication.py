"""Bytes on the wire: what one rank sends in a step, transfer by transfer, and how long that takes.

Letters: L tokens of the packed sequence, V visual ones among them, D hidden size.

Ranks are numbered as megatron numbers them: tensor fastest, then context, data, pipeline. A gather or reduction moves
round rings, one for every rank that a group has in a node, so that each uses its own network card. In an exchange every
rank sends every other one as much. ``sent`` counts what one rank sends; it receives as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridprune_megatron.layers.attention import widths as attention_widths
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.mamba import exchanged_channels
from hybridprune_megatron.layers.mamba import inner_width as mamba_inner

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

_FP32 = 4
#: Columns beside the hidden states that carry a token's index over a stage cut: as in models/stage_cut.py.
ORIGIN_COLUMNS = 3


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other.

    Attributes:
        ranks: how many.
        near: how many of them share a node.
    """

    ranks: int
    near: int


@dataclass(frozen=True)
class Transfer:
    """One message of a step, as one rank sends it.

    Attributes:
        what: tensor, context, experts, scores, drop, frames, pipeline, gradients or parameters.
        phase: forward or backward of a micro-batch, or step (once an optimizer step).
        group: the ranks.
        sent: bytes.
        ring: round a ring of the group; else straight to every other rank.
        hidden: runs while the layer's products do (megatron's asynchronous gathers of the backward pass).
    """

    what: str
    phase: str
    group: Group
    sent: float
    ring: bool = True
    hidden: bool = False

    @property
    def far(self) -> float:
        """Bytes that leave the node."""
        ranks, near = self.group.ranks, self.group.near
        if near == ranks:
            return 0.0
        return self.sent / near if self.ring else self.sent * (ranks - near) / (ranks - 1)

    @property
    def near(self) -> float:
        """Bytes that stay in the node."""
        return self.sent - self.far

    def seconds(self, near: float, far: float, hop: float) -> float:
        """Time of it; links within and between nodes work at once.

        Args:
            near: bytes a second to the other ranks of a node.
            far: bytes a second to other nodes.
            hop: seconds of latency a message.
        """
        hops = self.group.ranks - 1 if self.ring else 1
        return max(self.near / near, self.far / far) + hops * hop


def all_gather(what: str, phase: str, group: Group, whole: float, hidden: bool = False) -> list[Transfer]:
    """All-gather of parts, or reduce-scatter of sums, of a tensor of so many bytes; nothing among one rank."""
    sent = whole * (group.ranks - 1) / group.ranks
    return [Transfer(what, phase, group, sent, hidden=hidden)] if sent else []


def all_reduce(what: str, phase: str, group: Group, whole: float, hidden: bool = False) -> list[Transfer]:
    """All-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(what, phase, group, whole, hidden)


def all_to_all(what: str, phase: str, group: Group, held: float) -> list[Transfer]:
    """All-to-all of so many bytes that a rank holds."""
    sent = held * (group.ranks - 1) / group.ranks
    return [Transfer(what, phase, group, sent, ring=False)] if sent else []


def _pooled_scores(group: Group, visual: int, pooling: str) -> list[Transfer]:
    """Scores over the heads of all ranks: their mean is taken in shares of the tokens, their maximum in one message."""
    if pooling != "mean":
        return all_reduce("scores", "forward", group, visual * _FP32)
    filled = -(-visual // group.ranks) * group.ranks * _FP32
    return all_to_all("scores", "forward", group, filled) + all_gather("scores", "forward", group, filled)


class Wires:
    """The transfers of one configuration.

    Args:
        cfg: model, parallel split and machines are read; ``trainer.devices`` is a node.
        width: bytes of an activation.
    """

    def __init__(self, cfg: Config, width: int) -> None:
        self.cfg, self.width = cfg, width
        parallel, data = cfg.parallel, cfg.data_parallel_size
        self.tensor = self._group(parallel.tensor, 1)
        self.context = self._group(parallel.context, parallel.tensor)
        self.heads = self._group(parallel.tensor * parallel.context, 1)
        self.data = self._group(parallel.context * data, parallel.tensor)
        stage = parallel.tensor * parallel.context * data
        self.experts = self._group(parallel.expert, 1)
        self.stages = Group(2, 2 if 2 * stage <= cfg.trainer.devices else 1)

    def _group(self, ranks: int, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, self.cfg.trainer.devices // stride)))

    def layer(self, symbol: str, tokens: int) -> list[Transfer]:
        """Forward and backward of one layer.

        Tensor parallelism: under sequence parallelism the input is gathered and the output reduce-scattered; backward
        gathers the output's gradient, and beside the products the input once more and the input's gradient. Without,
        one all-reduce each way. Context parallelism: keys and values are gathered; Mamba exchanges tokens for heads
        before the convolution and heads for tokens after the scan. Expert parallelism: every token goes to its
        experts and back; the tensor-parallel transfers are then those of the shared expert.

        Args:
            symbol: M, *, - or E.
            tokens: L that enter it.
        """
        stream = self._stream(tokens)
        if self.cfg.parallel.sequence_parallel:
            transfers = 2 * all_gather("tensor", "forward", self.tensor, stream)
            transfers += all_gather("tensor", "backward", self.tensor, stream)
            transfers += 2 * all_gather("tensor", "backward", self.tensor, stream, hidden=True)
        else:
            transfers = all_reduce("tensor", "forward", self.tensor, stream)
            transfers += all_reduce("tensor", "backward", self.tensor, stream, hidden=True)
        model, tensor = self.cfg.model, self.cfg.parallel.tensor
        for phase in ("forward", "backward"):
            if KINDS[symbol].name == "attention":
                keys = 2 * attention_widths(model)[1] // tensor
                transfers += all_gather("context", phase, self.context, tokens * keys * self.width)
            elif KINDS[symbol].name == "mamba":
                there = exchanged_channels(model, tensor, self.cfg.parallel.context)
                for channels in (there, mamba_inner(model) // tensor):
                    transfers += all_to_all("context", phase, self.context, self._local(tokens) * channels * self.width)
            elif KINDS[symbol].name == "experts" and model.experts is not None:
                inner = model.experts.latent_size or model.hidden_size
                held = self._local(tokens) // tensor * model.experts.experts_per_token * inner * self.width
                transfers += 2 * all_to_all("experts", phase, self.experts, held)
        return transfers

    def reduction(self, symbol: str, before: int, after: int, visual: int, question: int) -> list[Transfer]:
        """One reduction after a layer: the scores, and the rows that move.

        Attention: context ranks share the keys, so the rows that ask, their log-sum-exps and the scores of the keys of
        each travel. Mamba: ranks share the heads. Rows move by one uneven exchange after which every rank holds as
        many; that all but its own share of them come from other ranks is an upper bound.

        Args:
            symbol: M or *, the layer that scores.
            before: tokens that enter it.
            after: tokens that it passes on.
            visual: V, scored ones.
            question: tokens that ask.
        """
        parallel, transfers = self.cfg.parallel, []
        score, kind = self.cfg.reduction.score, KINDS[symbol].name
        if score.reads_signals and kind == "attention":
            queries = attention_widths(self.cfg.model)[0] // parallel.tensor
            log_sums = question * self.cfg.model.num_attention_heads // parallel.tensor
            transfers += all_reduce("scores", "forward", self.context, question * queries * self.width)
            transfers += all_gather("scores", "forward", self.context, parallel.context * log_sums * _FP32)
            transfers += all_gather("scores", "forward", self.context, before * _FP32)
            transfers += _pooled_scores(self.tensor, visual, score.pooling(kind))
        elif score.reads_signals:
            transfers += _pooled_scores(self.heads, visual, score.pooling(kind))
        if parallel.sequence_parallel:
            transfers += all_gather("drop", "forward", self.tensor, self._stream(before))
            transfers += all_gather("drop", "backward", self.tensor, self._stream(after))
        for phase in ("forward", "backward"):
            transfers += all_to_all("drop", phase, self.context, self._stream(after))
        return transfers

    def frames(self, tokens: int, visual: int, sharers: Group) -> list[Transfer]:
        """The first stage's start: embedded words summed over the vocabulary's shards, frames gathered.

        Args:
            tokens: L of the whole sequence, which every rank embeds.
            visual: visual tokens among them.
            sharers: the ranks that divide the frames.
        """
        row = self.cfg.model.hidden_size * self.width
        transfers = all_reduce("frames", "forward", self.tensor, tokens * row)
        for phase in ("forward", "backward"):
            transfers += all_gather("frames", phase, sharers, visual * row)
        if self.cfg.parallel.sequence_parallel:
            transfers += all_gather("frames", "backward", self.tensor, self._stream(tokens))
        return transfers

    def head(self, tokens: int) -> list[Transfer]:
        """The last stage's end: the hidden states gathered, from which rows with a loss are cut."""
        if not self.cfg.parallel.sequence_parallel:
            return []
        return all_gather("tensor", "forward", self.tensor, self._stream(tokens))

    def cut(self, tokens: int, phase: str) -> list[Transfer]:
        """Hidden states (or their gradient) over a stage cut, with the columns that carry token indices."""
        columns = self.cfg.model.hidden_size + ORIGIN_COLUMNS
        shards = self.cfg.parallel.tensor if self.cfg.parallel.sequence_parallel else 1
        sent = self._local(tokens) * columns * self.width / shards
        return [Transfer("pipeline", phase, self.stages, sent, ring=False)]

    def step(self, gradients: int, of_frames: int = 0) -> list[Transfer]:
        """Gradients and parameters, once a step.

        Args:
            gradients: bytes of fp32 gradients on this rank.
            of_frames: bytes of those of tower and projector, which tensor ranks that share the frames add up.
        """
        shared = []
        if self.cfg.parallel.sequence_parallel and of_frames:
            shared = all_reduce("frames", "step", self.tensor, of_frames)
        if not self.cfg.parallel.distributed_optimizer:
            return shared + all_reduce("gradients", "step", self.data, gradients)
        weights = gradients // _FP32 * self.width
        return [
            *shared,
            *all_gather("gradients", "step", self.data, gradients),
            *all_gather("parameters", "step", self.data, weights),
        ]

    def _local(self, tokens: int) -> int:
        return -(-tokens // self.cfg.parallel.context)

    def _stream(self, tokens: int) -> int:
        """Bytes of the residual stream of one context shard."""
        return self._local(tokens) * self.cfg.model.hidden_size * self.width
