"""A small megatron model and an endless loader with a state: the engine without the project's model and data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybridprune_megatron.data.batch import IGNORE_LABEL, EncodedSample, PackedBatch, no_pixels, pack
from hybridprune_megatron.data.streams import streams_of
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind
from hybridprune_megatron.models.language_model import likeliest_tokens
from tests.models.tiny import tiny_batch

VOCAB = 64
LENGTH = 32


class TinyModel(GPTModel):
    """A GPT of two layers behind the project's model interface."""

    reduction = None

    def forward(self, batch: PackedBatch, judged: bool = False) -> Tensor:
        ids, labels = batch.input_ids[None], batch.labels[None]
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        if judged and self.post_process:
            rows = batch.loss_mask > 0
            logits, own = super().forward(ids, positions, mask)[0, rows], batch.labels[rows]
            right = likeliest_tokens(logits, self.pg_collection.tp) == own
            losses = self.compute_language_model_loss(own[None], logits[:, None].contiguous())
            return torch.stack([losses[0], right.float()])
        out = super().forward(ids, positions, mask, labels=labels.clamp(min=0))
        return out[0][batch.loss_mask > 0] if self.post_process else out

    def input_shape(self, batch: PackedBatch) -> tuple[int, int, int]:
        """What crosses the stage cut; see ``VideoLanguageModel.input_shape``."""
        return batch.input_ids.numel(), 1, self.config.hidden_size


def tiny_model(
    pre_process: bool = True,
    post_process: bool = True,
    dropout: float = 0.0,
    bf16: bool = False,
    length: int = LENGTH,
) -> TinyModel:
    """A fresh model on the seeds and groups in force."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )
    return TinyModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    )


def counting_sample(key: str, generator: torch.Generator) -> EncodedSample:
    """A run of numbers that count up from a random start: a model learns it in a few steps."""
    length = int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=generator))
    start = int(torch.randint(0, VOCAB, (), generator=generator))
    ids = (start + torch.arange(length + 1)) % VOCAB
    labels = ids[1:].clone()
    labels[: length // 4] = IGNORE_LABEL
    layout = SampleLayout((Span(TokenKind.TEXT, length),))
    return EncodedSample(key, ids[:-1], labels, layout, no_pixels())


class CountingLoader:
    """Endless batches of one sample in ``streams`` streams; a stream's state is its generator's and a count."""

    def __init__(self, rank: int, size: int, streams: int = 2, seed: int = 5) -> None:
        own = streams_of(rank, size, streams)
        self._generators = {stream: torch.Generator().manual_seed(seed + 1000 * stream) for stream in own}
        self._counts = dict.fromkeys(own, 0)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            for stream, generator in self._generators.items():
                self._counts[stream] += 1
                yield pack([counting_sample(f"{stream}/{self._counts[stream]}", generator)])

    def save_state(self) -> dict[int, Any]:
        return {
            stream: {"generator": generator.get_state(), "count": self._counts[stream]}
            for stream, generator in self._generators.items()
        }

    def load_state(self, states: dict[int, Any]) -> None:
        assert states.keys() == self._counts.keys()
        for stream, state in states.items():
            self._generators[stream].set_state(state["generator"])
            self._counts[stream] = state["count"]


class ClipLoader:
    """Endless batches of a few small clips in ``streams`` streams; a stream's state is a count."""

    def __init__(self, rank: int, size: int, streams: int = 2, pad_to_multiple_of: int = 1) -> None:
        self._streams = streams
        self._multiple = pad_to_multiple_of
        self._counts = dict.fromkeys(streams_of(rank, size, streams), 0)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            for stream in self._counts:
                number = self._counts[stream] * self._streams + stream
                self._counts[stream] += 1
                yield tiny_batch(3 + number % 3, 2, 5, pad_to_multiple_of=self._multiple)

    def save_state(self) -> dict[int, Any]:
        return {stream: {"count": count} for stream, count in self._counts.items()}

    def load_state(self, states: dict[int, Any]) -> None:
        assert states.keys() == self._counts.keys()
        self._counts = {stream: state["count"] for stream, state in states.items()}
