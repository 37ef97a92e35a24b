"""Where the tokens of a packed sequence come from: text, video frames, question, answer.

Spans describe one sample on the host. ``TokenLayout`` describes a packed sequence of samples at one depth of the model:
sizes on the host (so that every shape is known without asking the device), indices on the device.

Shape letters: L tokens of the packed sequence, S samples, V visual tokens, T query tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import groupby
from typing import Any

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
    def from_kinds(
        kinds: Sequence[int], tokens_per_frame: int | None = None, frames_per_video: Sequence[int] | None = None
    ) -> SampleLayout:
        """Builds spans from one ``TokenKind`` value per token.

        Args:
            kinds: [L] token kinds.
            tokens_per_frame: cuts a run of FRAME tokens into frames of this length; None makes each run one frame.
            frames_per_video: frames of every video of the sample in order, for kinds do not tell videos apart; None:
                all frames belong to one video.

        Raises:
            ValueError: a run of FRAME tokens is not a multiple of ``tokens_per_frame``, or there are other than
                ``frames_per_video`` says.
        """
        spans: list[Span] = []
        lengths: list[int] = []
        for kind, run in groupby(kinds):
            length = len(list(run))
            if kind != TokenKind.FRAME:
                spans.append(Span(TokenKind(kind), length))
                continue
            per_frame = tokens_per_frame or length
            if length % per_frame:
                raise ValueError(f"{length} visual tokens in a row: expected a multiple of {per_frame} a frame")
            for _ in range(length // per_frame):
                # Numbered over the sample; which video and frame that is, is known once all are counted.
                spans.append(Span(TokenKind.FRAME, per_frame, 0, len(lengths)))
                lengths.append(per_frame)
        counts = list(frames_per_video) if frames_per_video is not None else [len(lengths)]
        if sum(counts) != len(lengths):
            raise ValueError(f"frames_per_video={counts}: the sample has {len(lengths)} frames")
        names = [(video, frame) for video, count in enumerate(counts) for frame in range(count)]
        named = [replace(s, video=names[s.frame][0], frame=names[s.frame][1]) if s.frame >= 0 else s for s in spans]
        return SampleLayout(tuple(named))

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

    def frames_per_video(self) -> list[int]:
        """Frames of every video of the sample, in order."""
        frames = {(span.video, span.frame) for span in self.spans if span.kind == TokenKind.FRAME}
        per_video = Counter(video for video, _ in frames)
        return [per_video[video] for video in sorted(per_video)]


@dataclass(frozen=True)
class TokenLayout:
    """A packed sequence at one depth: which of the original tokens are still there, and where.

    Attributes:
        sample_lengths: S current lengths (host).
        visual_counts: S current numbers of visual tokens (host).
        query_counts: S numbers of query tokens (host); they never change.
        original_visual_counts: S numbers of visual tokens before any reduction (host).
        frame_videos: F videos, counted over the packed sequence, of its frames before any reduction (host). Frames are
            counted over samples, videos and time, so that neighbours in time are neighbours in number.
        patches_per_frame: visual tokens of the largest frame before any reduction (host).
        visual_index: int64 [V], rising, positions of the visual tokens in the packed sequence.
        visual_frame: int64 [V], frame of every visual token.
        visual_patch: int64 [V], its place within the frame before any reduction.
        query_index: int64 [T], rising, positions of the query tokens.
        origin: int64 [L], rising, index of every token in the packed sequence before any reduction.
        position: int64 [L], position of every token within its sample before any reduction.
        cu_seqlens: int32 [S + 1], where samples start.
    """

    sample_lengths: tuple[int, ...]
    visual_counts: tuple[int, ...]
    query_counts: tuple[int, ...]
    original_visual_counts: tuple[int, ...]
    frame_videos: tuple[int, ...]
    patches_per_frame: int
    visual_index: Tensor
    visual_frame: Tensor
    visual_patch: Tensor
    query_index: Tensor
    origin: Tensor
    position: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def from_samples(samples: Sequence[SampleLayout], device: torch.device | str = "cpu") -> TokenLayout:
        """The layout of samples packed one after another, before any reduction.

        Everything is found on the host, where no size has to be waited for, and copied once.
        """
        spans = [(sample, span) for sample, layout in enumerate(samples) for span in layout.spans]
        sizes = torch.tensor([span.num_tokens for _, span in spans], dtype=torch.int64)
        kinds = torch.tensor([int(span.kind) for _, span in spans], dtype=torch.uint8).repeat_interleave(sizes)
        lengths = [sample.num_tokens for sample in samples]
        visual_counts = tuple(sample.num_visual for sample in samples)
        frame, patch, frame_videos = _frames(spans)
        on_device = {
            "visual_index": torch.nonzero(kinds == TokenKind.FRAME).flatten(),
            "visual_frame": frame,
            "visual_patch": patch,
            "query_index": torch.nonzero(kinds == TokenKind.QUESTION).flatten(),
            "position": torch.cat([torch.empty(0).long(), *(torch.arange(length) for length in lengths)]),
        }
        return TokenLayout(
            sample_lengths=tuple(lengths),
            visual_counts=visual_counts,
            query_counts=tuple(sample.count(TokenKind.QUESTION) for sample in samples),
            original_visual_counts=visual_counts,
            frame_videos=frame_videos,
            patches_per_frame=int(patch.max()) + 1 if len(patch) else 0,
            origin=torch.arange(sum(lengths), device=device),
            cu_seqlens=cumulative_lengths(lengths, device),
            **{name: values.to(device, non_blocking=True) for name, values in on_device.items()},
        )

    def taken(self, kept: Tensor, visual_counts: Sequence[int]) -> TokenLayout:
        """The layout of the tokens that are left.

        Args:
            kept: int64 [L'], rising, their indices in this packed sequence: all text and some visual tokens.
            visual_counts: S numbers of visual tokens among them (host).
        """
        lengths = tuple(
            length - present + count
            for length, present, count in zip(self.sample_lengths, self.visual_counts, visual_counts)
        )
        # Which visual token, or which query token, every token is; -1: none. Numbers of a size the host knows, so that
        # nothing waits for the device.
        visual = self._numbered(self.visual_index)[kept]
        visual_index = torch.nonzero_static(visual >= 0, size=sum(visual_counts)).flatten()
        asks = self._numbered(self.query_index)[kept] >= 0
        chosen = visual[visual_index]
        return replace(
            self,
            sample_lengths=lengths,
            visual_counts=tuple(visual_counts),
            visual_index=visual_index,
            visual_frame=self.visual_frame[chosen],
            visual_patch=self.visual_patch[chosen],
            query_index=torch.nonzero_static(asks, size=sum(self.query_counts)).flatten(),
            origin=self.origin[kept],
            position=self.position[kept],
            cu_seqlens=cumulative_lengths(lengths, kept.device),
        )

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with its indices on another device; itself if they are there."""
        if self.origin.device == torch.device(device):
            return self
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return TokenLayout(**values)

    def _numbered(self, index: Tensor) -> Tensor:
        """int64 [L]: the place in ``index`` of every token, -1 where it is not there."""
        numbers = index.new_full((self.num_tokens,), -1)
        numbers[index] = torch.arange(len(index), device=index.device)
        return numbers

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


def _frames(spans: Sequence[tuple[int, Span]]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Frame and patch of every visual token, and the video of every frame; see ``TokenLayout``.

    Args:
        spans: all spans of the packed sequence with the number of their sample. Spans that name the same frame are
            parts of it.
    """
    visual = [(sample, span) for sample, span in spans if span.kind == TokenKind.FRAME]
    in_time = sorted({(sample, span.video, span.frame) for sample, span in visual})
    number = {name: index for index, name in enumerate(in_time)}
    videos = {name: index for index, name in enumerate(dict.fromkeys(name[:2] for name in in_time))}
    filled = [0] * len(in_time)
    frames, patches = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for sample, span in visual:
        frame = number[sample, span.video, span.frame]
        frames.append(torch.full((span.num_tokens,), frame))
        patches.append(torch.arange(filled[frame], filled[frame] + span.num_tokens))
        filled[frame] += span.num_tokens
    return torch.cat(frames), torch.cat(patches), tuple(videos[name[:2]] for name in in_time)


def cumulative_lengths(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """int32 [S + 1] running sum of host lengths on a device, as packed attention kernels want it."""
    return torch.tensor(_offsets(lengths), dtype=torch.int32).to(device, non_blocking=True)


def _offsets(lengths: Sequence[int]) -> list[int]:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets
