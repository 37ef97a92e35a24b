"""What the operators are tested on: the CPU, the kernels for GPUs run on a CPU, and a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.operators import attention_scores, mamba_scores
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals, scored_samples
from tests.kernels.emulation import emulated

BACKENDS = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


def native(backend: str) -> Any:
    """The operators."""
    import hybridprune_kernels  # noqa: F401

    return emulated() if backend == "emulated" else torch.ops.hybridprune


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "cuda" else "cpu")


def moved(values: Any, device: torch.device) -> Any:
    """A dataclass of tensors on a device."""
    tensors = {name: value.to(device) for name, value in vars(values).items() if isinstance(value, torch.Tensor)}
    return replace(values, **tensors)


def sample(visual: int, question: int, behind: int = 0) -> SampleLayout:
    """Text, visual tokens, a question, more visual tokens, an answer; 0: left out."""
    spans = [Span(TokenKind.TEXT, 2)]
    spans += [Span(TokenKind.FRAME, visual, 0, 0)] if visual else []
    spans += [Span(TokenKind.QUESTION, question)] if question else []
    spans += [Span(TokenKind.FRAME, behind, 0, 1), Span(TokenKind.QUESTION, 1)] if behind else []
    return SampleLayout((*spans, Span(TokenKind.ANSWER, 3)))


# Lengths beside and on the borders of tiles and blocks; samples that show nothing in front, between and behind.
LAYOUTS = {
    "one token": [SampleLayout((Span(TokenKind.FRAME, 1, 0, 0), Span(TokenKind.QUESTION, 1)))],
    "packed": [sample(0, 2), sample(70, 3, 21), sample(0, 0), sample(1, 1), sample(64, 67), sample(0, 4)],
    "long": [sample(590, 5, 33)],
    "nothing shown": [sample(0, 2), sample(0, 0)],
}


def layout_of(name: str, device: torch.device) -> TokenLayout:
    return moved(TokenLayout.from_samples(LAYOUTS[name]), device)


def attention_of(
    layout: TokenLayout, heads: int, key_heads: int, width: int, dtype: torch.dtype = torch.float32
) -> AttentionSignals:
    generator = torch.Generator().manual_seed(heads + width)
    q = torch.randn(layout.num_tokens, heads, width, generator=generator).to(dtype)
    k = torch.randn(layout.num_tokens, key_heads, width, generator=generator).to(dtype)
    device = layout.origin.device
    return AttentionSignals.of(q.to(device), k.to(device), layout)


def mamba_of(
    layout: TokenLayout, groups: int, heads: int, state: int, dtype: torch.dtype = torch.float32
) -> MambaSignals:
    generator = torch.Generator().manual_seed(groups + state)
    B, C = (torch.randn(layout.num_tokens, groups, state, generator=generator).to(dtype) for _ in range(2))
    step = torch.nn.functional.softplus(torch.randn(layout.num_tokens, heads, generator=generator) - 2)
    rate = -torch.rand(heads, generator=generator)
    return moved(MambaSignals(B, C, step, rate), layout.origin.device)


def fast_attention(backend: str, signals: AttentionSignals, layout: TokenLayout, scorer: QueryScorer) -> torch.Tensor:
    """Native scores of the keys that are here, by a score's settings."""
    samples = scored_samples(layout, scorer.rows)
    how = (scorer.attention_causal, scorer.attention_pooling)
    return attention_scores(native(backend), signals, layout, samples, *how)


def fast_mamba(backend: str, signals: MambaSignals, layout: TokenLayout, scorer: QueryScorer) -> torch.Tensor:
    """Native scores of the visual tokens, by a score's settings."""
    samples = scored_samples(layout, scorer.rows)
    how = (scorer.mamba_decay, scorer.mamba_dt, scorer.mamba_function, scorer.mamba_contrast, scorer.mamba_pooling)
    return mamba_scores(native(backend), signals, layout, samples, *how)
