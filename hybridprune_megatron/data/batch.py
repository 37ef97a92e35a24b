"""What travels from the data to the model: one encoded sample, and several of them packed into one sequence.

Shape letters: L tokens, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from hybridprune_megatron.method.counts import PackSizes
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind

#: Label of a token after which nothing is predicted.
IGNORE_LABEL = -100
#: Key of samples that only fill a packed sequence up.
PADDING_KEY = ""


@dataclass(frozen=True)
class FrameFeatures:
    """What a frozen vision tower made of frames, after the pixel shuffle and before the projector.

    Attributes:
        values: bf16 or float32 [F, M, C], M tokens a frame of C channels.
        tower: fingerprint of the tower (``tower_fingerprint``).
    """

    values: Tensor
    tower: str


@dataclass(frozen=True)
class EncodedSample:
    """One sample, tokenized and decoded.

    Attributes:
        key: name of the sample in its data set.
        input_ids: int64 [L].
        labels: int64 [L], already shifted: ``labels[i]`` is the target after token i, ``IGNORE_LABEL`` where no loss.
        layout: what every token is.
        pixel_values: uint8 [F, 3, H, W], RGB, frames in the order in which the layout shows them.
        frame_features: features of the frames instead of ``pixel_values``, in the same order; None: there are none.
    """

    key: str
    input_ids: Tensor
    labels: Tensor
    layout: SampleLayout
    pixel_values: Tensor
    frame_features: FrameFeatures | None = None

    def __post_init__(self) -> None:
        length = self.layout.num_tokens
        assert self.input_ids.shape == (length,), (self.key, self.input_ids.shape, length)
        assert self.labels.shape == (length,), (self.key, self.labels.shape, length)


@dataclass(frozen=True)
class PackedBatch:
    """Samples one after another in one sequence. Positions restart at 0 in every sample (see ``TokenLayout``).

    Attributes:
        keys: one key a sample; samples that fill the sequence up are last and named ``PADDING_KEY``.
        input_ids: int64 [L].
        labels: int64 [L], shifted within every sample.
        loss_mask: float32 [L], 1 where there is a label.
        layouts: one layout a sample.
        pixel_values: uint8 [F, 3, H, W], the frames of all samples.
        frame_features: features of the frames of all samples instead of ``pixel_values``; None: there are none.
        num_loss_tokens: number of labels, known on the host so that nobody has to ask the device.
        retention: share of its visual tokens that enters each layer, a row a sample (host); None: the model's own.
        budgets: what was drawn for every sample, for the log (host); None: nothing was.
    """

    keys: list[str]
    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    layouts: list[SampleLayout]
    pixel_values: Tensor
    num_loss_tokens: int = -1
    frame_features: FrameFeatures | None = None
    retention: tuple[tuple[float, ...], ...] | None = None
    budgets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_loss_tokens < 0:
            object.__setattr__(self, "num_loss_tokens", int(self.loss_mask.sum().item()))

    @property
    def sizes(self) -> PackSizes:
        """What decides how much work the batch is."""
        visual = tuple(layout.num_visual for layout in self.layouts)
        features = self.frame_features
        encoded = len(self.pixel_values) if features is None else 0
        return PackSizes(
            visual=visual,
            text=tuple(layout.num_tokens - count for layout, count in zip(self.layouts, visual)),
            question=tuple(layout.count(TokenKind.QUESTION) for layout in self.layouts),
            loss_rows=self.num_loss_tokens,
            frames=encoded if features is None else len(features.values),
            encoded=encoded,
            retentions=self.retention,
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on a device."""
        features = self.frame_features
        if features is not None:
            features = replace(features, values=features.values.to(device, non_blocking=True))
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            frame_features=features,
        )


def no_pixels() -> Tensor:
    """uint8 [0, 3, 0, 0], the frames of a sample that has none."""
    return torch.empty(0, 3, 0, 0, dtype=torch.uint8)


def pack(samples: Sequence[EncodedSample], pad_to_multiple_of: int = 1, pad_id: int = 0) -> PackedBatch:
    """Puts samples one after another.

    Args:
        samples: at least one.
        pad_to_multiple_of: the length becomes a multiple of this; what is missing are more samples of text without
            loss (see ``_filling``), so that no real sample ever sees padding.
        pad_id: fills up where every sample begins with a frame.

    Raises:
        ValueError: there are no samples, their frames differ in size, or their features come from several towers or
            stand beside frames.
    """
    if not samples:
        raise ValueError("0 samples to pack: a packed sequence holds at least one")
    keys = [sample.key for sample in samples]
    layouts = [sample.layout for sample in samples]
    input_ids = [sample.input_ids for sample in samples]
    labels = [sample.labels for sample in samples]
    padding = -sum(layout.num_tokens for layout in layouts) % pad_to_multiple_of
    for ids in _filling(samples, padding, pad_id):
        keys.append(PADDING_KEY)
        layouts.append(SampleLayout((Span(TokenKind.TEXT, len(ids)),)))
        input_ids.append(ids)
        labels.append(torch.full_like(ids, IGNORE_LABEL))
    all_labels = torch.cat(labels)
    pixel_values = _join_frames([sample.pixel_values for sample in samples])
    features = join_features([sample.frame_features for sample in samples if sample.frame_features is not None])
    if features is not None and len(pixel_values):
        raise ValueError(
            f"samples {', '.join(keys)} show frames and features in one batch: give data.train and data.validation "
            "either videos or features, not both"
        )
    return PackedBatch(
        keys=keys,
        input_ids=torch.cat(input_ids),
        labels=all_labels,
        loss_mask=(all_labels != IGNORE_LABEL).float(),
        layouts=layouts,
        pixel_values=pixel_values,
        frame_features=features,
    )


def _filling(samples: Sequence[EncodedSample], length: int, pad_id: int) -> list[Tensor]:
    """``length`` tokens to fill a sequence up with: the longest text that one of the samples begins with, again.

    Nothing after a token reaches it, so in every layer these rows are copies of rows that are there anyway. A scale of
    FP8, which the largest number decides, is the same with and without them; padding tokens would bring their own.

    Args:
        length: tokens that are missing.
        pad_id: the token, where every sample begins with a frame.

    Returns:
        int64 [n] each, samples of their own.
    """
    texts = [sample.input_ids[: _tokens_before_frames(sample.layout)] for sample in samples]
    text = max(texts, key=len)
    if not len(text):
        text = torch.full((length,), pad_id, dtype=torch.int64)
    return [text[: length - start] for start in range(0, length, max(len(text), 1))]


def _tokens_before_frames(layout: SampleLayout) -> int:
    text = takewhile(lambda span: span.kind != TokenKind.FRAME, layout.spans)
    return sum(span.num_tokens for span in text)


def join_features(parts: Sequence[FrameFeatures]) -> FrameFeatures | None:
    """Features one after another, not copied if there is one part only; None if there is none.

    Raises:
        ValueError: they come from several towers.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    towers = sorted({part.tower for part in parts})
    if len(towers) > 1:
        raise ValueError(f"features of towers {', '.join(towers)} in one batch: precompute all with the same weights")
    return FrameFeatures(torch.cat([part.values for part in parts]), towers[0])


def sums_by_sample(values: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Adds up what is known of single tokens by the samples that they belong to.

    Args:
        values: [R, C], of R tokens of a packed sequence; on the host.
        rows: int64 [R], where they stand in it.
        lengths: of the S samples.

    Returns:
        float64 [S, C].
    """
    sample = torch.searchsorted(torch.tensor(lengths).cumsum(0), rows, right=True)
    return torch.zeros(len(lengths), values.shape[1], dtype=torch.float64).index_add(0, sample, values.double())


def _join_frames(frames: Sequence[Tensor]) -> Tensor:
    # Samples without frames say nothing about the frame size, so they must not take part in the comparison.
    present = [each for each in frames if len(each)]
    if not present:
        return no_pixels()
    sizes = sorted({tuple(each.shape[1:]) for each in present})
    if len(sizes) > 1:
        raise ValueError(f"frames of sizes {sizes} in one batch: decode all with the same model.vision.frame_size")
    return torch.cat(present)
