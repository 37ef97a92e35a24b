"""Memory of one rank: what always lies there, and what a training step or a prefill needs at its worst moment.

Assumptions, beside those of ``activations``:

- bf16 weights, or fp32 ones; gradients of what is trained in fp32; Adam's two moments in fp32, and with bf16 weights an
  fp32 copy of them. The distributed optimizer divides moments and copy by the data- and context-parallel ranks.
- Tensor parallelism splits the layers, the embedding and the output layer; tower and projector lie whole on the first
  pipeline stage. Context parallelism divides tokens and frames, sequence parallelism frames too; attention keeps the
  keys and values of all its ranks, and B and C of a group lie on every rank that has heads of it. A stage holds one
  micro-batch for every stage from it on, as in one-forward-one-backward.
- A training step runs one packed sequence of ``data.sequence_length`` tokens, filled with the sample that is planned
  for. A frozen tower keeps nothing; the projector keeps its inputs for the whole step.
- Full recomputation keeps every layer's input, selective recomputation all but what convolution, scan and attention's
  core keep; a layer that is recomputed needs all of its tensors again.
- While a layer runs backward, gradients of its two widest tensors and of its input are there too, and what the plain
  torch scan computes of a block of chunks. A layer in prefill is counted as if all its tensors lived at once, which is
  an upper bound.
- Not counted: the allocator's slack, communication buffers, CUDA's context, the loader's batch, a teacher's forward
  pass (``tuning.distillation``), what adapters keep, the embedded sequence before it is sharded. Frozen layers are
  taken to keep what trained ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from hybridprune_megatron.cost.activations import (
    block_activations,
    block_peak,
    context_activations,
    head_activations,
    layer_activations,
    layer_input,
    projector_activations,
    total_bytes,
)
from hybridprune_megatron.cost.parameters import (
    adapter_parameters,
    embedding_parameters,
    final_norm_parameters,
    layer_parameters,
    projector_adapter_parameters,
    projector_parameters,
    tower_parameters,
)
from hybridprune_megatron.cost.vision import patches_per_frame, tokens_in_tower
from hybridprune_megatron.layers.kind import Kept, Parameters
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.layers.operations import WIDTH

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

GIB = 2**30
_FP32 = 4


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one rank that lie there all the time.

    Attributes:
        weights: of all parts.
        gradients: of the trained parts.
        optimizer: of the trained parts, this rank's share.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: StaticMemory) -> StaticMemory:
        return StaticMemory(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """Peak memory of the fullest rank.

    Attributes:
        stage: its pipeline stage.
        static: what always lies there; in prefill the weights only.
        kept: activations (in prefill: caches) at the worst moment.
        working: what the worst moment needs beside them.
        moment: that moment, in words.
    """

    stage: int
    static: StaticMemory
    kept: int
    working: int
    moment: str

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return self.static.total + self.kept + self.working


@dataclass(frozen=True)
class Packed:
    """Samples that share a sequence.

    Attributes:
        samples: number of samples.
        visual: visual tokens of one that enter every layer.
        text: all other tokens of one.
        frames: frames of one that tower and projector encode.
        loss_rows: tokens of one that have a loss (in prefill: whose logits are wanted).
    """

    samples: int
    visual: tuple[int, ...]
    text: int
    frames: int
    loss_rows: int

    def tokens(self, layer: int) -> int:
        """Tokens that enter a layer."""
        return self.samples * (self.visual[layer] + self.text)


def training_memory(cfg: Config, packed: Packed) -> Memory:
    """Peak memory of a training step on the fullest rank.

    Args:
        cfg: model, precision, recomputation and parallel split are read.
    """
    stages = [Stage(cfg, index) for index in range(len(cfg.model.stages))]
    return max((stage.training(packed) for stage in stages), key=lambda memory: memory.total)


def prefill_memory(cfg: Config, packed: Packed) -> Memory:
    """Peak memory of a prefill that fills the caches for decoding, on the fullest rank; arguments as above."""
    stages = [Stage(cfg, index) for index in range(len(cfg.model.stages))]
    return max((stage.prefill(packed) for stage in stages), key=lambda memory: memory.total)


class Stage:
    """One pipeline stage as one of its ranks holds it.

    Args:
        index: 0-based number of the stage.
    """

    def __init__(self, cfg: Config, index: int) -> None:
        self.cfg, self.index = cfg, index
        model, stages = cfg.model, cfg.model.stages
        self.first, self.last = index == 0, index == len(stages) - 1
        self.symbols = stages[index]
        self.offset = sum(len(stage) for stage in stages[:index])
        self.width = WIDTH[cfg.trainer.precision]
        self.fused = model.spec != "torch"
        self.vision = model.vision if self.first else None

    def static(self) -> StaticMemory:
        """Weights, gradients and optimizer states."""
        model, learns = self.cfg.model, self.cfg.model.trainable
        language = sum((layer_parameters(model, symbol) for symbol in self.symbols), Parameters())
        if self.last:
            language += final_norm_parameters(model)
        # Tied weights lie on the first stage and, if that is another one, on the last.
        tables = int(self.first) + int(self.last and not (self.first and model.tie_embeddings))
        for _ in range(tables):
            language += embedding_parameters(model)
        lora = self.cfg.tuning.lora
        adapters = projector_adapters = Parameters()
        if lora.rank:
            adapters = sum((adapter_parameters(model, symbol, lora) for symbol in self.symbols), adapters)
        # Adapters learn instead of the part that they stand on.
        memory = self._part(language, learns.language and not adapters.total)
        memory += self._part(adapters, learns.language)
        if self.vision is not None:
            if lora.rank:
                projector_adapters = projector_adapter_parameters(self.vision, model.hidden_size, lora)
            projector = projector_parameters(self.vision, model.hidden_size)
            memory += self._part(tower_parameters(self.vision), learns.vision)
            memory += self._part(projector, learns.projector and not projector_adapters.total)
            memory += self._part(projector_adapters, learns.projector)
        return memory

    def _part(self, parameters: Parameters, learns: bool) -> StaticMemory:
        parallel = self.cfg.parallel
        usual, fp32 = parameters.on_rank(parallel.tensor)
        experts = parameters.experts // parallel.expert
        weights = (usual + experts) * self.width + fp32 * _FP32
        if not learns:
            return StaticMemory(weights)
        replicas = self.cfg.data_parallel_size * parallel.context
        copies = int(self.width < _FP32)
        # Experts are whole on a rank: those that tensor-parallel ranks hold are replicas too.
        states = (
            (_FP32 * ((2 + copies) * usual + 2 * fp32), replicas),
            (_FP32 * (2 + copies) * experts, replicas * parallel.tensor // parallel.expert),
        )
        return StaticMemory(
            weights,
            _FP32 * (usual + fp32 + experts),
            sum(-(-size // (ranks if parallel.distributed_optimizer else 1)) for size, ranks in states),
        )

    def training(self, packed: Packed) -> Memory:
        """The worst moment of a step: encoding the frames, some layer's backward, or the loss."""
        in_flight = min(len(self.cfg.model.stages) - self.index, self.cfg.num_micro_batches)
        stored, needed = [], []
        for layer, symbol in enumerate(self.symbols, start=self.offset):
            kept, tokens = self._layer(symbol), self._tokens(packed, layer)
            stored.append(self._bytes(self._stored(kept), tokens))
            again = self._bytes(kept, tokens) - stored[-1]
            kind, tensor = KINDS[symbol], self.cfg.parallel.tensor
            workspace = 0 if self.fused else kind.workspace(self.cfg.model, tokens, tensor)
            needed.append(again + self._gradients(kept, tokens) + workspace)
        encoder = self._encoder(packed)
        others = (in_flight - 1) * (sum(stored) + encoder)
        moments = [
            (others + encoder + kept, working, f"backward of layer {layer} ({symbol})")
            for layer, (symbol, kept, working) in enumerate(
                zip(self.symbols, accumulate(stored), needed), start=self.offset
            )
        ]
        if self.last:
            moments.append((others + encoder + sum(stored), self._loss(packed), "loss"))
        if self.vision is not None and packed.frames:
            moments += self._encoding(packed, others)
            moments.append((others + encoder, self._projector_gradients(packed), "backward of the projector"))
        return self._worst(self.static(), moments)

    def prefill(self, packed: Packed) -> Memory:
        """The worst moment of a prefill: encoding the frames, some layer, or the logits."""
        weights = StaticMemory(self.static().weights)
        caches, working = [], []
        for layer, symbol in enumerate(self.symbols, start=self.offset):
            tokens = packed.tokens(layer)
            cache = KINDS[symbol].cache_bytes(self.cfg.model, tokens, packed.samples, self.width)
            caches.append(cache // self.cfg.parallel.tensor)
            working.append(self._bytes(self._layer(symbol), tokens))
        moments = [
            (kept, needed, f"layer {layer} ({symbol})")
            for layer, (symbol, kept, needed) in enumerate(
                zip(self.symbols, accumulate(caches), working), start=self.offset
            )
        ]
        if self.last:
            moments.append((sum(caches), self._loss(packed), "logits"))
        if self.vision is not None and packed.frames:
            moments += self._encoding(packed, 0)
        return self._worst(weights, moments)

    def _worst(self, static: StaticMemory, moments: list[tuple[int, int, str]]) -> Memory:
        kept, working, moment = max(moments, key=lambda each: each[0] + each[1])
        return Memory(self.index, static, kept, working, moment)

    def _tokens(self, packed: Packed, layer: int) -> int:
        return -(-packed.tokens(layer) // self.cfg.parallel.context)

    def _frames(self, packed: Packed) -> int:
        """Frames that this rank encodes."""
        return -(-packed.samples * packed.frames // self.cfg.parallel.sequence_shares)

    def _layer(self, symbol: str) -> list[Kept]:
        model, parallel = self.cfg.model, self.cfg.parallel
        kept = layer_activations(model, symbol, self.width, self.fused)
        return kept + context_activations(model, symbol, self.width, parallel.tensor, parallel.context)

    def _stored(self, kept: list[Kept]) -> list[Kept]:
        """What stays of it until backward; the rest is computed again."""
        if self.cfg.trainer.recompute == "full":
            return [self._input()]
        return [each for each in kept if not each.core] if self.cfg.trainer.recompute == "selective" else kept

    def _input(self) -> Kept:
        return layer_input(self.cfg.model, self.width)

    def _bytes(self, kept: Sequence[Kept], tokens: int) -> int:
        parallel = self.cfg.parallel
        return total_bytes(kept, tokens, parallel.tensor, parallel.sequence_parallel)

    def _gradients(self, kept: Sequence[Kept], tokens: int) -> int:
        """Gradients that live at once while a layer runs backward."""
        widest = max(self._bytes([each], tokens) for each in kept)
        return 2 * widest + self._bytes([self._input()], tokens)

    def _loss(self, packed: Packed) -> int:
        """Final norm, the gathered hidden states, logits and their exponentials."""
        layer = len(packed.visual) - 1
        tokens = self._tokens(packed, layer)
        rows = -(-packed.samples * packed.loss_rows // self.cfg.parallel.context)
        logits = Kept("logits", self.cfg.model.vocab_size, self.width, "channels")
        norm = [self._input(), Kept("gathered", self.cfg.model.hidden_size, self.width)]
        return self._bytes(norm, tokens) + self._bytes([*head_activations(self.cfg.model, self.width), logits], rows)

    def _encoder(self, packed: Packed) -> int:
        """What tower and projector keep for their backward."""
        vision, learns = self.vision, self.cfg.model.trainable
        if vision is None or not packed.frames:
            return 0
        frames, kept = self._frames(packed), 0
        if learns.projector or learns.vision:
            kept += total_bytes(projector_activations(vision, self.width), frames * vision.tokens_per_frame)
        if learns.vision:
            block = total_bytes(block_activations(vision, self.width), frames * tokens_in_tower(vision))
            kept += vision.num_layers * block
        return kept

    def _encoding(self, packed: Packed, others: int) -> list[tuple[int, int, str]]:
        """The moments of the tower, all frames at once, and of the projector after it."""
        vision = self.vision
        assert vision is not None, "only the first stage of a model with a tower encodes"
        frames, kept = self._frames(packed), self._encoder(packed)
        numbers = frames * 3 * vision.frame_size**2
        # Normalising the frames takes two fp32 copies; in the run's precision they stay, raw and normalised.
        pixels = numbers * (self.width + 2 * _FP32)
        tower = (frames * tokens_in_tower(vision) * block_peak(vision) + 2 * numbers) * self.width
        features = 2 * frames * patches_per_frame(vision) * vision.hidden_size * self.width
        tokens = frames * vision.tokens_per_frame
        projector = max(total_bytes(projector_activations(vision, self.width), tokens) - kept, 0)
        in_tower = kept if self.cfg.model.trainable.vision else 0
        return [
            (others + in_tower, max(pixels, tower), "encoding of the frames"),
            # The tower's features and their shuffled copy are still there.
            (others + kept, features + projector, "projection of the frames"),
        ]

    def _projector_gradients(self, packed: Packed) -> int:
        assert self.vision is not None, "only the first stage of a model with a tower encodes"
        kept = projector_activations(self.vision, self.width)
        tokens = self._frames(packed) * self.vision.tokens_per_frame
        return 2 * max(total_bytes([each], tokens) for each in kept)
