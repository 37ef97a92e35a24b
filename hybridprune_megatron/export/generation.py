"""What transformers' ``generate`` asks of the exported model.

A second question in the same chat continues over the caches of the first one, or prefills the video again:

- ``generate(input_ids=chat_so_far_and_question, past_key_values=cache)`` continues. The second question reads what the
  first one kept, layer by layer, and every token since; it scores nothing and drops nothing. A token that the
  first question dropped after layer l is gone for all layers after l, and for the attention of none before; its trace
  in the Mamba states of layers up to l remains.
- ``generate(**inputs_of_the_whole_chat)`` without ``past_key_values`` prefills again. Which question then scores is the
  processor's ``conversation_mode``: "split_turns" lets the last one choose.

All videos come in the first call: image tokens after filled caches are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig

from hybridprune_megatron.export.cache_name import cache_argument, given_cache

# Of the prompt whose tokens the caches hold already.
_PREFILL_INPUTS = ("pixel_values", "token_kinds", "frames_per_video")
# What generate reads for itself and passes on all the same, for models whose forward takes anything.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "return_dict")
# Outputs that transformers has a name for and this model does not make.
_NOT_MADE = {
    "output_attentions": "attention is computed without its weights",
    "output_hidden_states": "layers hold different tokens (output_reduction=True says which)",
}


class HybridGenerationMixin(GenerationMixin):
    """``GenerationMixin`` for caches of our own and frames that belong to samples; see the module's docstring."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Generation starts without caches; prefill makes our own."""
        return False

    def generate(self, *args: Any, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with the caches under either of its names."""
        return super().generate(*args, **cache_argument(given_cache(past_key_values, cache)), **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; a call that continues over filled caches is checked and needs no frames.

        Raises:
            ValueError: the columns are not those that the caches have seen and more.
        """
        cache = given_cache(past_key_values, cache)
        dropped: tuple[str, ...] = _OF_GENERATE
        if is_first_iteration and cache is not None and cache.get_seq_length():
            if kwargs.get("use_cache") is False:
                raise ValueError("use_cache=False with past_key_values: generate continues over them; leave one out")
            _check_continuation(input_ids, next_sequence_length, cache.seen(), attention_mask)
            dropped += _PREFILL_INPUTS
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **cache_argument(cache),
            **{name: value for name, value in kwargs.items() if name not in dropped},
        )

    def heal_tokens(self, input_ids: Tensor, tokenizer: Any = None) -> Tensor:
        """Refused: it takes the special tokens out of a prompt.

        Raises:
            ValueError: always.
        """
        raise ValueError("token_healing=True: a prompt without its special tokens has no frames; leave it out")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and with it ``generate_batch``: prompts without frames, over paged caches.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            'continuous batching (generate_batch, cache_implementation="paged"): this model drops tokens from caches '
            "of its own; use generate"
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats samples for beams; the frames of a sample stay together, which repeating rows would not do."""
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            frames = (input_ids == self.config.image_token_id).sum(1) // self.config.tokens_per_frame
            pixels = torch.cat([part for part in pixels.split(frames.tolist()) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs


def refuse_other_arguments(config: PreTrainedConfig, others: dict[str, Any]) -> None:
    """Arguments of ``forward`` that other models take; generate passes some on unseen.

    Args:
        config: may ask for outputs, too.
        others: by name; None and False ask for nothing.

    Raises:
        ValueError: one of them asks for something.
    """
    asked = {name: getattr(config, name) for name in _NOT_MADE} | others
    for name, value in asked.items():
        if value is not None and value is not False:
            shown = f"{name}={value}" if isinstance(value, bool | int | float | str) else name
            raise ValueError(f"{shown}: {_NOT_MADE.get(name, 'this model does not take it')}; leave {name} out")


def _check_continuation(input_ids: Tensor, num_new: int | None, seen: Tensor, attention_mask: Tensor | None) -> None:
    """The new columns continue where the caches end.

    Args:
        input_ids: int64 [B, L], all columns or the new ones.
        num_new: how many of all columns are new; None: only the new ones are given.
        seen: int64 [S, columns] of the caches.
        attention_mask: [B, all columns], or None.
    """
    again, past = "leave past_key_values out to prefill again", seen.shape[1]
    if len(input_ids) != len(seen):
        raise ValueError(
            f"{len(input_ids)} rows of input_ids and caches of {len(seen)}: give the same chats, or {again}"
        )
    if num_new is not None and num_new < 1:
        raise ValueError(f"input_ids of {past + num_new} columns and caches of {past}: give new columns, or {again}")
    differs = torch.nonzero((input_ids[:, :past] != seen[:, : input_ids.shape[1]]).any(0)).flatten()
    if num_new is not None and len(differs):
        raise ValueError(
            f"input_ids differ from column {int(differs[0])} on from what the caches have seen: give the ids that "
            f"generate returned with the new turn after them (processor.next_turn), or {again}"
        )
    if num_new is None and not len(differs) and input_ids.shape[1] > past:
        # transformers takes all columns for new ones where the mask is of another length.
        raise ValueError(
            f"input_ids begin with the {past} columns of the caches, and attention_mask is of another length than "
            f"{input_ids.shape[1]}: give the mask of all columns, or none, or {again}"
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask has padding inside a row, where an answer ended before the others of its batch: continue "
            f"with such chats one by one, or {again}"
        )
