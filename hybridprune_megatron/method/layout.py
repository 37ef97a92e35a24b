"""Where the tokens of a packed sequence come from: text, video frames, question, answer.

Spans describe one sample on the host. ``TokenLayout`` describes a packed sequence of samples at one depth of the model:
sizes on the host (so that every shape is known without asking the device), indices on the device.

Shape letters: L tokens of the packed sequence, S samples, V visual tokens, T query tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class TokenKind(IntEnum):
    """What a token is. Only ``FRAME`` tokens may be dropped, only ``QUESTION`` tokens score."""

    TEXT = 0
    FRAME = 1
    QUESTION = 2
    ANSWER = 3


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind.

    Attributes:
        kind: what the tokens are.
        num_tokens: length of the run, at least 1.
        video: which video of the sample the tokens show (0-based), -1 for text.
        frame: which frame of that video (0-based), -1 for text.
    """

    kind: TokenKind
    num_tokens: int
    video: int = -1
    frame: int = -1

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"span of {self.num_tokens} tokens: a span has at least one; leave empty runs out")
        if (self.kind == TokenKind.FRAME) != (self.video >= 0 and self.frame >= 0):
            raise ValueError(
                f"span {self.kind.name} has video={self.video} frame={self.frame}: exactly FRAME spans name both"
            )


@dataclass(frozen=True)
class SampleLayout:
    """The spans of one sample in order; videos and text may interleave in any way."""

    spans: tuple[Span, ...]

    @staticmethod
    def from_kinds(kinds: Sequence[int], tokens_per_frame: int | None = None) -> SampleLayout:
        """Builds spans from one ``TokenKind`` value per token.

        Args:
            kinds: [L] token kinds.
            tokens_per_frame: cuts a run of FRAME tokens into frames of this length; None makes each run one frame.
                The videos of the sample cannot be told apart here, so all frames belong to video 0.

        Raises:
            ValueError: a run of FRAME tokens is not a multiple of ``tokens_per_frame``.
        """
        spans: list[Span] = []
        frame = 0
        start = 0
        while start < len(kinds):
            stop = start
            while stop < len(kinds) and kinds[stop] == kinds[start]:
                stop += 1
            kind, length = TokenKind(kinds[start]), stop - start
            if kind != TokenKind.FRAME:
                spans.append(Span(kind, length))
            else:
                per_frame = tokens_per_frame or length
                if length % per_frame:
                    raise ValueError(f"{length} visual tokens in a row: expected a multiple of {per_frame} a frame")
                for _ in range(length // per_frame):
                    spans.append(Span(kind, per_frame, video=0, frame=frame))
                    frame += 1
            start = stop
        return SampleLayout(tuple(spans))

    def count(self, kind: TokenKind) -> int:
        """Number of tokens of a kind."""
        return sum(span.num_tokens for span in self.spans if span.kind == kind)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_visual(self) -> int:
        return self.count(TokenKind.FRAME)

    def kinds(self) -> list[int]:
        """[L] kind of every token."""
        return [int(span.kind) for span in self.spans for _ in range(span.num_tokens)]


@dataclass(frozen=True)
class TokenLayout:
    """A packed sequence at one depth: which of the original tokens are still there, and where.

    Attributes:
        sample_lengths: S current lengths (host).
        visual_counts: S current numbers of visual tokens (host).
        query_counts: S numbers of query tokens (host); they never change.
        original_visual_counts: S numbers of visual tokens before any reduction (host).
        visual_index: int64 [V], rising, positions of the visual tokens in the packed sequence.
        query_index: int64 [T], rising, positions of the query tokens.
        origin: int64 [L], rising, index of every token in the packed sequence before any reduction.
        position: int64 [L], position of every token within its sample before any reduction.
        cu_seqlens: int32 [S + 1], where samples start.
    """

    sample_lengths: tuple[int, ...]
    visual_counts: tuple[int, ...]
    query_counts: tuple[int, ...]
    original_visual_counts: tuple[int, ...]
    visual_index: Tensor
    query_index: Tensor
    origin: Tensor
    position: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def from_samples(samples: Sequence[SampleLayout], device: torch.device | str = "cpu") -> TokenLayout:
        """The layout of samples packed one after another, before any reduction."""
        kinds = torch.tensor([kind for sample in samples for kind in sample.kinds()], dtype=torch.uint8)
        return TokenLayout.from_kinds(kinds, [sample.num_tokens for sample in samples], device)

    @staticmethod
    def from_kinds(kinds: Tensor, lengths: Sequence[int], device: torch.device | str = "cpu") -> TokenLayout:
        """The layout of a packed sequence before any reduction, from the kind of every token.

        Args:
            kinds: int [L] ``TokenKind`` values, on the host.
            lengths: S lengths of the samples, sum L.
            device: where the indices go.
        """
        per_sample = kinds.split(list(lengths))
        # Indices are found on the host, where nonzero() costs no synchronisation, and copied once.
        visual_index = torch.nonzero(kinds == TokenKind.FRAME).flatten()
        query_index = torch.nonzero(kinds == TokenKind.QUESTION).flatten()
        position = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0).long()
        visual_counts = tuple(int((sample == TokenKind.FRAME).sum()) for sample in per_sample)
        return TokenLayout(
            sample_lengths=tuple(lengths),
            visual_counts=visual_counts,
            query_counts=tuple(int((sample == TokenKind.QUESTION).sum()) for sample in per_sample),
            original_visual_counts=visual_counts,
            visual_index=visual_index.to(device, non_blocking=True),
            query_index=query_index.to(device, non_blocking=True),
            origin=torch.arange(sum(lengths), device=device),
            position=position.to(device, non_blocking=True),
            cu_seqlens=cumulative_lengths(lengths, device),
        )

    @property
    def num_tokens(self) -> int:
        return sum(self.sample_lengths)

    def sample_index(self) -> Tensor:
        """int32 [L] sample of every token."""
        samples = torch.arange(len(self.sample_lengths), device=self.origin.device, dtype=torch.int32)
        # output_size spares the host from asking the device how long the result is.
        return torch.repeat_interleave(samples, self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def sample_position(self, sample_index: Tensor) -> Tensor:
        """int64 [L] distance of every token from the start of its sample, counting present tokens only."""
        starts = self.cu_seqlens[:-1].long()
        return torch.arange(self.num_tokens, device=self.origin.device) - starts[sample_index.long()]

    def sample_starts(self) -> list[int]:
        """S + 1 offsets of the samples in the packed sequence (host)."""
        return _offsets(self.sample_lengths)

    def visual_starts(self) -> list[int]:
        """S + 1 offsets of the samples in ``visual_index`` (host)."""
        return _offsets(self.visual_counts)

    def query_starts(self) -> list[int]:
        """S + 1 offsets of the samples in ``query_index`` (host)."""
        return _offsets(self.query_counts)


def cumulative_lengths(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """int32 [S + 1] running sum of host lengths on a device, as packed attention kernels want it."""
    return torch.tensor(_offsets(lengths), dtype=torch.int32).to(device, non_blocking=True)


def _offsets(lengths: Sequence[int]) -> list[int]:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets
