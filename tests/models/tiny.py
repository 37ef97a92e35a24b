"""A small configuration of the real model, and samples for it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample, PackedBatch, pack
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from tests.models.composed import composed

PATTERN = "M-M*M-"


def tiny_config(*overrides: str, pattern: str = PATTERN, budget: float = 0.5) -> Config:
    """The demo's experiment shrunk to a few thousand parameters, trained from random weights."""
    small = """
        model.hidden_size=32 model.ffn_hidden_size=64 model.num_attention_heads=4 model.num_query_groups=2
        model.kv_channels=8 model.mamba_num_heads=4 model.mamba_head_dim=8 model.mamba_state_dim=8
        model.mamba_num_groups=2 model.mamba_chunk_size=8 model.vocab_size=64 model.init_std=0.1
        model.init_checkpoint=null model.spec=torch
        model.vision.hidden_size=16 model.vision.num_layers=1 model.vision.num_attention_heads=2
        model.vision.intermediate_size=32 model.vision.patch_size=8 model.vision.frame_size=32
        model.vision.position_grid_px=32 model.vision.projector_hidden_size=24 trainer.precision=fp32
    """
    fixed = [f"model.hybrid_pattern='{pattern}'", f"reduction.budget={budget}"]
    return composed(["experiment=demo", *small.split()], [*fixed, *overrides])


def tiny_sample(index: int, frames: int = 3, tokens_per_frame: int = 4, videos: int = 1) -> EncodedSample:
    """Text, frames of every video around a text, question, answer; lengths are odd and differ between samples."""
    spans = [Span(TokenKind.TEXT, 2 + index)]
    for video, frame in product(range(videos), range(frames)):
        spans += [Span(TokenKind.TEXT, 1), Span(TokenKind.FRAME, tokens_per_frame, video, frame)]
    spans += [Span(TokenKind.QUESTION, 3 + index), Span(TokenKind.TEXT, 2), Span(TokenKind.ANSWER, 2)]
    layout = SampleLayout(tuple(spans))
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 64, (layout.num_tokens,), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[-3:-1] = ids[-2:]
    pixels = torch.randint(0, 256, (videos * frames, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return EncodedSample(f"sample-{index}", ids, labels, layout, pixels)


def tiny_batch(*frames: int, pad_to_multiple_of: int = 1) -> PackedBatch:
    """One packed sequence with one sample a number of frames."""
    return pack([tiny_sample(index, count) for index, count in enumerate(frames)], pad_to_multiple_of)


def check_layouts(batch: PackedBatch, layouts: Iterable[TokenLayout]) -> None:
    """Nothing but visual tokens was dropped, and the indices of what is left still name what they say."""
    kinds = torch.tensor([kind for layout in batch.layouts for kind in layout.kinds()])
    for layout in layouts:
        survivors = kinds[layout.origin]
        assert (survivors != TokenKind.FRAME).sum() == (kinds != TokenKind.FRAME).sum(), "text was dropped"
        assert survivors[layout.visual_index].eq(TokenKind.FRAME).all()
        assert survivors[layout.query_index].eq(TokenKind.QUESTION).all()
