"""Prompts answered as an export answers them: one prefill under a reduction, then tokens over the shortened caches.

A checkpoint and an export go through the same code, and every figure of a prompt comes from the caches of one prefill:
how likely an answer is, which of several is likeliest, and what greedy decoding writes.

Shape letters: S samples, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample, FrameFeatures, PackedBatch, pack
from hybridprune_megatron.engine.load import load_model
from hybridprune_megatron.evaluation.accuracy import sample_retention
from hybridprune_megatron.evaluation.decoding import exported_model
from hybridprune_megatron.export.cache import HybridCache
from hybridprune_megatron.export.modeling_hybridprune import HybridLanguageModel
from hybridprune_megatron.export.read import load_export
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.models.encoder import encode_frames
from hybridprune_megatron.models.video_language_model import tower_fingerprint


@dataclass(frozen=True)
class Prefilled:
    """Prompts that wait for their answers.

    Attributes:
        cache: what the layers keep, a row a sample.
        logits: [S, V] of the first token of each answer.
        shares: per sample with visual tokens, the share of them that entered every layer.
    """

    cache: HybridCache
    logits: Tensor
    shares: list[tuple[float, ...]]

    def rows(self, index: Sequence[int]) -> Prefilled:
        """Some of the samples, on copies of their caches."""
        order = torch.tensor(index, dtype=torch.int64)
        cache = HybridCache()
        for number, layer in self.cache.layers.items():
            cache.layers[number] = copy.copy(layer)
            cache.layers[number].reorder(order)
        return Prefilled(cache, self.logits[order.to(self.logits.device)], [])


@dataclass(frozen=True)
class Likelihood:
    """How likely a model is to write a text and its end.

    Attributes:
        loss: sum over its tokens, nats.
        tokens: how many it has.
        exact: each of them is the likeliest, so greedy decoding writes exactly this.
    """

    loss: float
    tokens: int
    exact: bool


class AnsweringModel:
    """A language model with its vision tower, whole on one device.

    Args:
        language: as an export computes it.
        tower: vision tower; None for a text-only model.
        projector: from the tower to the language model.
        shuffle: factor of the pixel shuffle between them.
    """

    def __init__(
        self, language: HybridLanguageModel, tower: Any, projector: nn.Module | None, shuffle: float = 1.0
    ) -> None:
        self.language, self.tower, self.projector, self.shuffle = language, tower, projector, shuffle
        self._fingerprint: str | None = None

    @staticmethod
    def load(source: Path, cfg: Config, is_export: bool) -> AnsweringModel:
        """The model of a checkpoint or of an export.

        Args:
            source: from ``config.own_keys.checkpoint_or_export``, as are the others.

        Raises:
            ValueError: the weights are of another model.
        """
        shuffle = cfg.model.vision.pixel_shuffle if cfg.model.vision is not None else 1.0
        if is_export:
            found = load_export(source).to("cuda" if torch.cuda.is_available() else "cpu")
            tower, projector = getattr(found, "vision_model", None), getattr(found, "mlp1", None)
            return AnsweringModel(found.language_model, tower, projector, shuffle)
        model = load_model(source, cfg)
        return AnsweringModel(exported_model(model, cfg), model.vision_model, model.mlp1, shuffle)

    @property
    def device(self) -> torch.device:
        """Where the prompts are computed."""
        return next(self.language.parameters()).device

    def embedded(self, samples: Sequence[EncodedSample]) -> tuple[PackedBatch, Tensor]:
        """Prompts packed into one sequence, and its embeddings [L, D]; no reduction changes these.

        Raises:
            ValueError: they show videos and the model has no tower, or features of another tower.
        """
        batch = pack(samples).to(self.device)
        with torch.no_grad():
            hidden = self.language.backbone.embeddings(batch.input_ids)
            visual = TokenLayout.from_samples(batch.layouts, self.device).visual_index
            if len(visual):
                frames = self._frames(batch).flatten(0, 1).to(hidden)
                hidden = hidden.index_copy(0, visual, frames)
        return batch, hidden

    def prefilled(self, batch: PackedBatch, hidden: Tensor, reduction: Reduction | None) -> Prefilled:
        """The prompts up to their answers.

        Args:
            batch, hidden: from ``embedded``.
            reduction: what is dropped; None: nothing.
        """
        layout, cache = TokenLayout.from_samples(batch.layouts, self.device), HybridCache()
        pixels = batch.pixel_values if batch.frame_features is None else None
        trace: list[TokenLayout] = []
        with torch.no_grad():
            dropping = ReductionPass.of(reduction, layout)
            hidden, layout = dropping.enter(hidden, layout, pixels)
            hidden, layout = self.language.backbone.prefill(hidden, layout, dropping, cache, trace)
            # Prompts end with text, which is never dropped.
            logits = self.language.logits(hidden[layout.cu_seqlens[1:].long() - 1])
        return Prefilled(cache, logits, sample_retention(trace))

    def likelihoods(self, prompts: Prefilled, texts: Sequence[Sequence[int]]) -> list[Likelihood]:
        """How likely one text is after each prompt; the prompts stay as they are.

        Args:
            texts: S lists of token ids, the end of the answer included; an empty one costs nothing.
        """
        lengths = torch.tensor([len(ids) for ids in texts])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, text in zip(ids, texts):
            row[: len(text)] = torch.tensor(text, dtype=torch.int64)
        present = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        losses, exact = torch.zeros(ids.shape, dtype=torch.float64), torch.ones(ids.shape, dtype=torch.bool)
        prompts, logits = prompts.rows(range(len(texts))), prompts.logits
        with torch.no_grad():
            columns = ids.to(self.device).unbind(1)
            for column, wanted in enumerate(columns):
                if column:
                    logits = self._step(columns[column - 1], prompts.cache)
                losses[:, column] = nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu().double()
                exact[:, column] = (logits.argmax(-1) == wanted).cpu()
        sums = (losses * present).sum(1).tolist()
        return [
            Likelihood(loss, length, right)
            for loss, length, right in zip(sums, lengths.tolist(), (exact | ~present).all(1).tolist())
        ]

    def likeliest(self, prompts: Prefilled, choices: Sequence[Sequence[Sequence[int]]]) -> list[int | None]:
        """Which of its choices each prompt is followed by most likely, the first of equal ones; None where none are.

        Args:
            choices: for each of S prompts the token ids of its choices, ends included.
        """
        losses: list[list[float]] = [[] for _ in choices]
        for number in range(max(map(len, choices), default=0)):
            asked = [row for row, own in enumerate(choices) if number < len(own)]
            found = self.likelihoods(prompts.rows(asked), [choices[row][number] for row in asked])
            for row, each in zip(asked, found):
                losses[row].append(each.loss)
        return [own.index(min(own)) if own else None for own in losses]

    def written(self, prompts: Prefilled, end: int, most: int) -> list[list[int]]:
        """Greedy answers, all of them decoded together until the last one has ended.

        Args:
            end: the token that ends an answer; it is not returned.
            most: tokens of an answer at most.
        """
        prompts = prompts.rows(range(len(prompts.logits)))
        logits = prompts.logits
        answers: list[list[int]] = [[] for _ in range(len(logits))]
        waiting = set(range(len(answers)))
        with torch.no_grad():
            for number in range(1, most + 1):
                best = logits.argmax(-1)
                tokens = best.tolist()
                waiting = {row for row in waiting if tokens[row] != end}
                for row in waiting:
                    answers[row].append(tokens[row])
                if not waiting or number == most:
                    break
                logits = self._step(best, prompts.cache)
        return answers

    def _step(self, tokens: Tensor, cache: HybridCache) -> Tensor:
        """Logits [S, V] after one more token of every sample, int64 [S]."""
        return self.language.logits(self.language.backbone.step(self.language.backbone.embeddings(tokens), cache))

    def _frames(self, batch: PackedBatch) -> Tensor:
        """[F, M, D]: the frames of a batch, from pixels or from features of the tower."""
        if self.tower is None or self.projector is None:
            raise ValueError(f"samples {batch.keys} show videos, and the model takes text only: give data without")
        if batch.frame_features is None:
            return encode_frames(self.tower, self.projector, batch.pixel_values, self.shuffle, False)
        return self.projector(self._own_features(batch.frame_features).to(next(self.projector.parameters()).dtype))

    def _own_features(self, features: FrameFeatures) -> Tensor:
        if self._fingerprint is None:
            self._fingerprint = tower_fingerprint(self.tower)
        if features.tower != self._fingerprint:
            raise ValueError(
                f"features of tower {features.tower}, the model's is {self._fingerprint}: precompute them with this "
                "model's weights (hybridprune features), or give data with the videos"
            )
        return features.values


@contextmanager
def answering(source: Path, cfg: Config, is_export: bool) -> Iterator[AnsweringModel]:
    """``AnsweringModel.load``; what it started for a checkpoint ends with the block."""
    from hybridprune_megatron.engine.parallel import shut_down

    try:
        yield AnsweringModel.load(source, cfg, is_export)
    finally:
        if not is_export:
            shut_down()
