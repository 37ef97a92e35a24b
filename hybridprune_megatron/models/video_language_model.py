"""Vision tower, projector and hybrid language model; names as in Nemotron Nano V2 VL's checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import RadioModel

from hybridprune_megatron.data.batch import PackedBatch
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.models.context import dealt_out
from hybridprune_megatron.models.encoder import encode_frames
from hybridprune_megatron.models.language_model import ReductionHybridModel

#: Settings that change what a tower computes and show in no weight.
_SETTINGS = ("num_attention_heads", "patch_size", "layer_norm_eps", "norm_mean", "norm_std")


def loss_rows(batch: PackedBatch) -> Tensor:
    """int64 [R], rising, the tokens of the packed sequence that have a label."""
    # Of a size the host knows, so nothing waits for the device.
    return torch.nonzero_static(batch.loss_mask > 0, size=batch.num_loss_tokens).flatten()


class VideoLanguageModel(MegatronModule):
    """Answers questions about videos; drops visual tokens inside its language model.

    Args:
        config: megatron's configuration of the language model.
        language_model: the hybrid language model.
        vision_model: tower, on the first stage of a model with vision.
        mlp1: projector, on the first stage of a model with vision.
        pixel_shuffle: factor of the pixel shuffle between them.
        train_vision: whether the tower learns.
        reduction: what to drop; None: nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language_model: ReductionHybridModel,
        vision_model: RadioModel | None,
        mlp1: nn.Module | None,
        pixel_shuffle: float,
        train_vision: bool,
        reduction: Reduction | None,
    ) -> None:
        super().__init__(config)
        self.vision_model = vision_model
        self.mlp1 = mlp1
        self.language_model = language_model
        self.pixel_shuffle = pixel_shuffle
        self.train_vision = train_vision
        self.reduction = reduction
        groups = language_model.pg_collection
        # Megatron adds up what tensor ranks have of such parameters' gradients only where they split the sequence.
        self._frame_sharers = [groups.tp_cp, groups.cp] if config.sequence_parallel else [groups.cp]
        for part in (vision_model, mlp1):
            if part is not None:
                for parameter in part.parameters():
                    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        # Of the tower, and the versions of its weights that it was taken of.
        self._fingerprint: tuple[list[int], str] | None = None
        # What megatron's schedules and DDP look up on the outermost module.
        self.model_type = language_model.model_type
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the pipeline stage before."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding that megatron keeps equal on the first and last stage, if tied."""
        return self.language_model.shared_embedding_or_output_weight()

    def train(self, mode: bool = True) -> VideoLanguageModel:
        """A frozen tower stays in eval mode, without the dropped paths that its configuration may ask for."""
        super().train(mode)
        if self.vision_model is not None and not self.train_vision:
            self.vision_model.eval()
        return self

    def forward(self, batch: PackedBatch, judged: bool = False) -> Tensor:
        """Losses of a packed batch.

        Args:
            batch: packed samples on this model's device.
            judged: asks for more than losses, see below.

        Returns:
            On the last stage float32 [R], one loss per token with a label (their number is ``batch.num_loss_tokens``
            over the context-parallel ranks, for text is never dropped); on other stages what crosses the stage cut.
            With ``judged`` float32 [2, R] for all tokens with a label: their losses, and 1 where the label is the
            likeliest token; zeros where another context-parallel rank has the row.
        """
        rows = loss_rows(batch)
        return self._run(batch, rows, batch.labels[rows], judged=judged)[0]

    def logits(
        self, batch: PackedBatch, rows: Tensor | None = None, trace: list[TokenLayout] | None = None
    ) -> tuple[Tensor, TokenLayout]:
        """Logits of chosen tokens (of all that are left, if None) and the layout after the last layer.

        Args:
            batch: packed samples on this model's device.
            rows: int64 [R], rising, indices into the unreduced packed sequence; text tokens only.
            trace: gets the layout that enters every layer.

        Returns:
            float [R, vocabulary of this rank] and the layout; under context parallelism those of R rows that lie here.
        """
        return self._run(batch, rows, None, trace)

    def _run(
        self,
        batch: PackedBatch,
        rows: Tensor | None,
        labels: Tensor | None,
        trace: list[TokenLayout] | None = None,
        judged: bool = False,
    ) -> tuple[Tensor, TokenLayout]:
        embeddings, layout = self.embedded(batch)
        dropping = self._pass_of(batch, layout)
        if embeddings is not None:
            pixels = batch.pixel_values if batch.frame_features is None else None
            embeddings, layout = dropping.enter(embeddings, layout, pixels)
        return self.language_model(embeddings, layout, dropping, rows, labels, trace, judged)

    def _pass_of(self, batch: PackedBatch, layout: TokenLayout) -> ReductionPass:
        """What is dropped in a batch whose samples may have a retention of their own, and ranks a choice of theirs."""
        decoder, reduction = self.language_model.decoder, self.reduction
        assert batch.retention is None or reduction is not None, "a batch with retentions, and a model without a score"
        dropping = decoder.pass_of(reduction, layout, batch.retention)
        if reduction is None or not reduction.select.local_choice or decoder.local_chunks == 1:
            return dropping
        return dropping.within_chunks(batch.layouts, decoder.local_chunks, decoder.multiple_of)

    def input_shape(self, batch: PackedBatch) -> tuple[int, int, int]:
        """Shape of what the pipeline stage before this one sends for a batch; known without asking it."""
        layout = TokenLayout.from_samples(batch.layouts)
        return self.language_model.decoder.input_shape(layout, self._pass_of(batch, layout))

    def embedded(self, batch: PackedBatch) -> tuple[Tensor | None, TokenLayout]:
        """[L, 1, hidden] embedded text with the projected frames at the visual positions, before any reduction.

        Args:
            batch: on this model's device.

        Returns:
            Embeddings (None but on the first pipeline stage), and the layout.
        """
        layout = TokenLayout.from_samples(batch.layouts, batch.input_ids.device)
        if not self.pre_process:
            return None, layout
        embeddings = self.language_model.embed(batch.input_ids)
        if sum(layout.visual_counts):
            visual = self.embed_frames(batch).flatten(0, 1).unsqueeze(1).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, layout.visual_index, visual)
        return embeddings, layout

    def embed_frames(self, batch: PackedBatch) -> Tensor:
        """The projected frames of a batch: from pixels through the tower, or from the tower's precomputed features.

        Context-parallel ranks, and tensor-parallel ranks that split the sequence, encode a part of the frames each.

        Args:
            batch: shows at least one frame.

        Returns:
            [F, M, hidden].

        Raises:
            ValueError: the model has no tower, or the features are of another.
        """
        if self.vision_model is None or self.mlp1 is None:
            raise ValueError(
                f"samples {batch.keys} show videos: model.vision is null; choose a model with vision or text-only data"
            )
        features = batch.frame_features
        if features is None:
            tower, projector = self.vision_model, self.mlp1
            return self._shared(
                lambda part: encode_frames(tower, projector, part, self.pixel_shuffle, self.train_vision),
                batch.pixel_values,
            )
        own = self._tower_fingerprint(self.vision_model)
        if features.tower != own:
            raise ValueError(
                f"features of tower {features.tower}, the model's is {own}: precompute them with this model's weights "
                "(hybridprune features), or set data.train and data.validation to the videos"
            )
        return self._shared(self.mlp1, features.values.to(next(self.mlp1.parameters()).dtype))

    def _shared(self, work: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        embedded = dealt_out(work, frames, self._frame_sharers)
        if self.config.sequence_parallel and embedded.requires_grad:
            # Every tensor-parallel rank has the whole gradient of the embeddings, and what follows from it is added up.
            tensor_ranks = self.config.tensor_model_parallel_size
            embedded.register_hook(lambda gradient: gradient / tensor_ranks)
        return embedded

    def _tower_fingerprint(self, tower: RadioModel) -> str:
        # Weights are loaded in place after the model is built, which raises their version.
        versions = [weight._version for weight in tower.parameters()]
        if self._fingerprint is None or self._fingerprint[0] != versions:
            self._fingerprint = (versions, tower_fingerprint(tower))
        return self._fingerprint[1]


def tower_fingerprint(tower: RadioModel) -> str:
    """16 hexadecimal digits of a SHA-256 over the tower's weights and settings.

    Weights count as rounded to bf16, so that a tower has one name whether it is loaded in fp32 or bf16.
    """
    digest = hashlib.sha256(repr([getattr(tower.config, name) for name in _SETTINGS]).encode())
    for name, value in sorted(tower.state_dict().items()):
        rounded = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(rounded.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
