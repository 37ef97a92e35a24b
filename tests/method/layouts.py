"""Packed sequences for the tests of the method."""

from __future__ import annotations

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout


def layout_of(*visual: int) -> TokenLayout:
    """One sample a number of visual tokens (0: text only), all in one frame with text on both sides."""
    samples = []
    for count in visual:
        frames = (Span(TokenKind.FRAME, count, 0, 0),) if count else ()
        samples.append(SampleLayout((Span(TokenKind.TEXT, 2), *frames, Span(TokenKind.QUESTION, 3))))
    return TokenLayout.from_samples(samples)
