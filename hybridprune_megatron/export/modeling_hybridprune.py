"""The exported model: answers questions about videos and drops visual tokens once, in prefill.

Parameter names are those of Nemotron Nano V2 VL (``language_model.backbone.*``, ``language_model.lm_head``,
``mlp1.*``, ``vision_model.*``, the last one in transformers' own names). Prefill runs over the real tokens of all
samples packed one after another, with the layout, scores and selection of training; a padded batch therefore equals its
samples one by one. Decoding continues over the shortened caches; what they hold, and what that means for a second
question, is in ``generation.py`` and ``cache.py``.

Shape letters: B samples, L columns of a padded batch, R real tokens packed, D hidden size, F frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, RadioModel
from transformers import initialization as init

from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.export.cache import HybridCache
from hybridprune_megatron.export.cache_name import cache_argument, given_cache
from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig, merge_reduction, resolve_reduction
from hybridprune_megatron.export.generation import HybridGenerationMixin, refuse_other_arguments
from hybridprune_megatron.export.layers import HybridLayer, MambaMixer, Packing
from hybridprune_megatron.export.outputs import HybridPruneOutput, ReductionStatistics
from hybridprune_megatron.export.padded_batch import PaddedBatch, kept_columns
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.schedule import layer_symbols
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.models.encoder import build_projector, encode_frames, radio_config


class HybridBackbone(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: HybridPruneConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        symbols = layer_symbols(config.hybrid_override_pattern)
        self.layers = nn.ModuleList([HybridLayer(config, symbol, index) for index, symbol in enumerate(symbols)])
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    # Its sizes are those of one prompt, known on the host: torch.compile would compile every prompt anew.
    @torch.compiler.disable
    def prefill(
        self,
        hidden: Tensor,
        layout: TokenLayout,
        dropping: ReductionPass,
        cache: HybridCache | None,
        trace: list[TokenLayout] | None,
    ) -> tuple[Tensor, TokenLayout]:
        """Runs the layers over packed tokens [R, D] and drops visual tokens in between; the caller applies the norm."""
        packing = Packing.of(layout, dropping.dt_filter)

        def run(index: int, hidden: Tensor, layout: TokenLayout, scorer: Scorer | None) -> tuple[Tensor, Tensor | None]:
            nonlocal packing
            if packing.layout is not layout:
                packing = Packing.of(layout, dropping.dt_filter)
            return self.layers[index](hidden, packing, scorer, cache)

        return dropping.walk(range(len(self.layers)), hidden, layout, run, trace=trace)

    def step(self, hidden: Tensor, cache: HybridCache) -> Tensor:
        """One more token of every sample: [B, D] to [B, D], the norm left to the caller."""
        for layer in self.layers:
            hidden, _ = layer(hidden, None, None, cache)
        return hidden


class HybridLanguageModel(nn.Module):
    """Backbone and output layer."""

    def __init__(self, config: HybridPruneConfig) -> None:
        super().__init__()
        self.backbone = HybridBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., vocabulary]."""
        return self.lm_head(self.backbone.norm_f(hidden))


class HybridPruneForCausalLM(PreTrainedModel, HybridGenerationMixin):
    """Video question answering with token reduction inside every layer; see the module's docstring.

    Args:
        config: its ``reduction`` decides what is dropped; ``set_reduction`` changes it later.
    """

    config_class = HybridPruneConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    # The loss is a mean over one call's labels: transformers' Trainer need not say how many a step has.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ("HybridLayer", "RadioLayer")
    _keep_in_fp32_modules_strict = ("A_log", "mixer.D", "e_score_correction_bias")
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embeddings.weight"}  # noqa: RUF012 - transformers' own attribute

    def __init__(self, config: HybridPruneConfig) -> None:
        super().__init__(config)
        self.language_model = HybridLanguageModel(config)
        if config.vision is not None:
            vision = config.vision
            self.vision_model = RadioModel(radio_config(vision))
            self.mlp1 = build_projector(
                vision["hidden_size"], vision["pixel_shuffle"], vision["projector_hidden_size"], config.hidden_size
            )
        self._reduction = _build_reduction(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.backbone.embeddings = value  # type: ignore[assignment]  # as in transformers

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output layer."""
        self.language_model.lm_head = new_embeddings  # type: ignore[assignment]  # as in transformers

    def set_reduction(self, reduction: dict[str, Any] | None) -> None:
        """Changes the reduction: None turns it off, ``{"budget": 0.5}`` keeps the other settings and solves it again.

        Raises:
            ValueError: an unknown key or a budget that cannot be met.
        """
        merged = merge_reduction(self.config.reduction, reduction)
        self.config.reduction = resolve_reduction(self.config.hybrid_override_pattern, merged)
        self._reduction = _build_reduction(self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        token_kinds: Tensor | None = None,
        frames_per_video: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_reduction: bool = False,
        return_dict: bool | None = None,
        cache: HybridCache | None = None,
        **others: Any,
    ) -> HybridPruneOutput | tuple:
        """Prefill, or decoding if ``past_key_values`` holds anything.

        Args:
            input_ids: int64 [B, L]; with caches only the new columns.
            attention_mask: [B, L], 0 for padding; None: no padding.
            pixel_values: [F, 3, height, width] from 0 to 255, the frames of all samples in order.
            token_kinds: int [B, L] ``TokenKind`` values from the processor; columns it does not cover (generated ones)
                are ANSWER. None: derived from the ids, see ``derive_token_kinds``.
            frames_per_video: int [B, videos] frames of every video of a row, 0 after its last; None: the frames of a
                row are one video.
            past_key_values, cache: caches of an earlier call, under either of transformers' names.
            labels: int64 [B, L] like ``input_ids``, shifted inside; -100: no loss.
            use_cache: whether to return caches; default: ``config.use_cache`` unless training or given labels.
            logits_to_keep: number of last columns, or their indices, whose logits are wanted; 0: all.
            output_reduction: whether a prefill tells which visual tokens entered which layer, in the output and in
                its caches: ``generate(..., output_reduction=True, return_dict_in_generate=True)`` has it in
                ``past_key_values.reduction``.
            return_dict: False returns a tuple.
            others: must be None or False.

        Raises:
            ValueError: frames do not fit the visual tokens, padding on the right with caches, caches of another kind,
                or an argument that this model does not take.
        """
        refuse_other_arguments(self.config, others)
        cache = given_cache(past_key_values, cache)
        if cache is not None and cache.get_seq_length():
            if pixel_values is not None or labels is not None:
                raise ValueError("pixel_values or labels together with filled caches: give them in the first call only")
            output = self._decode(input_ids, attention_mask, cache, logits_to_keep)
            return output if return_dict is not False else output.to_tuple()
        batch = PaddedBatch.of(self.config, input_ids, attention_mask, token_kinds, frames_per_video)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        filled = None
        if use_cache:
            if bool((batch.packed_index[:, -1] < 0).any()):
                raise ValueError(
                    "a row is padded on the right: decoding continues from the last column; pad on the left"
                )
            filled = cache if cache is not None else HybridCache()
            filled.add_columns(input_ids)
        output = self._forward_prompt(batch, pixel_values, filled, labels, logits_to_keep, output_reduction)
        return output if return_dict is not False else output.to_tuple()

    def _forward_prompt(
        self,
        batch: PaddedBatch,
        pixel_values: Tensor | None,
        cache: HybridCache | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        output_reduction: bool,
    ) -> HybridPruneOutput:
        """All tokens of a batch through layers that drop; logits of the columns that are left, NaN for the others."""
        trace: list[TokenLayout] | None = [] if output_reduction else None
        hidden = self._embed(batch, pixel_values)
        layout = batch.layout.to(hidden.device)
        dropping = ReductionPass.of(self._reduction, layout)
        hidden, layout = dropping.enter(hidden, layout, pixel_values)
        hidden, layout = self.language_model.backbone.prefill(hidden, layout, dropping, cache, trace)
        statistics = None if trace is None else ReductionStatistics.of(trace)
        if cache is not None:
            cache.reduction = statistics
        shown, where = batch.find(layout.to(hidden.device), logits_to_keep)
        values = self.language_model.logits(hidden[where])
        logits = values.new_full((*shown.shape, values.shape[-1]), float("nan"))
        logits = logits.masked_scatter(shown.unsqueeze(-1).to(logits.device), values)
        return HybridPruneOutput(
            loss=None if labels is None else _loss(logits, shown, labels),
            logits=logits,
            reduction=statistics,
            **cache_argument(cache),
        )

    def _embed(self, batch: PaddedBatch, pixel_values: Tensor | None) -> Tensor:
        """[R, D]: embedded text with the projected frames at the visual positions."""
        hidden = self.language_model.backbone.embeddings(batch.input_ids)
        visual, shown = sum(batch.layout.visual_counts), 0 if pixel_values is None else len(pixel_values)
        if self.config.vision is None:
            if visual or shown:
                raise ValueError(f"{shown} frames for a text-only model: leave pixel_values and image tokens out")
            return hidden
        if visual != shown * self.config.tokens_per_frame:
            raise ValueError(
                f"{shown} frames of {self.config.tokens_per_frame} tokens and {visual} image tokens: pixel_values and "
                "input_ids must come from one call of the processor"
            )
        if pixel_values is None or not shown:
            return hidden
        learns = next(self.vision_model.parameters()).requires_grad
        shuffle = self.config.vision["pixel_shuffle"]
        embedded = encode_frames(self.vision_model, self.mlp1, pixel_values, shuffle, learns)
        return hidden.index_copy(0, batch.layout.visual_index.to(hidden.device), embedded.flatten(0, 1).to(hidden))

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: HybridCache, logits_to_keep: int | Tensor
    ) -> HybridPruneOutput:
        """More tokens after the caches, one column at a time."""
        if len(input_ids) != cache.num_rows:
            raise ValueError(
                f"{len(input_ids)} rows of input_ids and caches of {cache.num_rows}: give the same samples"
            )
        columns, image = input_ids.shape[1], self.config.image_token_id
        if columns > 1 and attention_mask is not None and not bool(attention_mask[:, -columns:].all()):
            raise ValueError("new columns with padding after filled caches: give rows of one length, or start afresh")
        if columns > 1 and image is not None and bool((input_ids == image).any()):
            raise ValueError("image tokens after filled caches: give all videos in the first call")
        outputs = []
        for column in input_ids.unbind(1):
            embedded = self.language_model.backbone.embeddings(column)
            outputs.append(self.language_model.backbone.step(embedded, cache))
        cache.add_columns(input_ids)
        keep = kept_columns(logits_to_keep, columns)
        logits = self.language_model.logits(torch.stack(outputs, 1)[:, keep])
        return HybridPruneOutput(logits=logits, **cache_argument(cache))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaMixer):
            heads = torch.arange(1, module.A_log.shape[0] + 1, dtype=torch.float32)
            init.copy_(module.A_log, torch.log(heads))
            init.ones_(module.D)
            init.zeros_(module.dt_bias)


def _build_reduction(config: HybridPruneConfig) -> Reduction | None:
    """None at a budget of 1, which is the model without reduction."""
    if config.reduction is None:
        return None
    values = dict(config.reduction)
    retention = tuple(values.pop("retention"))
    return ReductionConfig.of(values).policy(config.hybrid_override_pattern, retention=retention)


def _loss(logits: Tensor, shown: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labels whose token in front is left."""
    if logits.shape[1] != labels.shape[1]:
        raise ValueError(
            f"logits of {logits.shape[1]} columns and labels of {labels.shape[1]}: leave logits_to_keep out"
        )
    labels, shown = labels.to(logits.device), shown.to(logits.device)
    used = (labels[:, 1:] != -100) & shown[:, :-1]
    return nn.functional.cross_entropy(logits[:, :-1][used].float(), labels[:, 1:][used])
