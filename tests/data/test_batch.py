"""Packing: concatenation, labels, padding."""

import pytest
import torch

from hybridprune_megatron.data.batch import IGNORE_LABEL, PADDING_KEY, EncodedSample, no_pixels, pack
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout


def make_sample(key: str, length: int, frames: int = 0, size: int = 4) -> EncodedSample:
    spans = [Span(TokenKind.FRAME, 2, 0, frame) for frame in range(frames)]
    spans.append(Span(TokenKind.TEXT, length - 2 * frames))
    labels = torch.full((length,), IGNORE_LABEL)
    labels[-3:-1] = torch.tensor([7, 8])
    pixels = torch.full((frames, 3, size, size), len(key), dtype=torch.uint8) if frames else no_pixels()
    return EncodedSample(key, torch.arange(length), labels, SampleLayout(tuple(spans)), pixels)


def test_pack_concatenates_and_restarts_positions() -> None:
    batch = pack([make_sample("a", 6, frames=1), make_sample("b", 5), make_sample("ccc", 8, frames=2)])
    assert batch.keys == ["a", "b", "ccc"]
    assert batch.input_ids.tolist() == [*range(6), *range(5), *range(8)]
    assert batch.num_loss_tokens == 6
    assert batch.loss_mask.sum() == 6
    assert batch.pixel_values.shape == (3, 3, 4, 4)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 3, 3]
    layout = TokenLayout.from_samples(batch.layouts)
    assert layout.position.tolist() == batch.input_ids.tolist()
    assert layout.cu_seqlens.tolist() == [0, 6, 11, 19]


def test_the_last_token_of_a_sample_never_predicts_the_next_sample() -> None:
    batch = pack([make_sample("a", 6), make_sample("b", 6)])
    assert batch.labels[5] == IGNORE_LABEL


def test_padding_is_a_sample_of_its_own_without_loss() -> None:
    batch = pack([make_sample("a", 6), make_sample("b", 5)], pad_to_multiple_of=8, pad_id=3)
    assert batch.keys == ["a", "b", PADDING_KEY]
    assert batch.input_ids.tolist()[11:] == [0, 1, 2, 3, 4]
    assert batch.layouts[-1].kinds() == [TokenKind.TEXT] * 5
    assert batch.loss_mask[11:].sum() == 0
    assert pack([make_sample("a", 8)], pad_to_multiple_of=8).keys == ["a"]


def test_a_sequence_is_filled_with_the_longest_text_that_a_sample_begins_with() -> None:
    spans = (Span(TokenKind.TEXT, 3), Span(TokenKind.FRAME, 2, 0, 0), Span(TokenKind.TEXT, 4))
    ids = torch.arange(100, 109)
    between = EncodedSample("x", ids, torch.full((9,), IGNORE_LABEL), SampleLayout(spans), no_pixels())
    batch = pack([make_sample("a", 6, frames=1), between], pad_to_multiple_of=32)
    assert batch.keys == ["a", "x", *[PADDING_KEY] * 6]
    assert batch.input_ids.tolist()[15:] == [100, 101, 102] * 5 + [100, 101]
    assert [layout.num_tokens for layout in batch.layouts[2:]] == [3] * 5 + [2]
    # Nobody begins with text: there is none to take.
    frames = pack([make_sample("a", 6, frames=1)], pad_to_multiple_of=16, pad_id=3)
    assert frames.input_ids.tolist()[6:] == [3] * 10
    assert frames.keys == ["a", PADDING_KEY]


def test_moving_keeps_the_count_on_the_host() -> None:
    moved = pack([make_sample("a", 6)]).to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.num_loss_tokens == 2


def test_pack_refuses_nothing_and_frames_of_two_sizes() -> None:
    with pytest.raises(ValueError, match="0 samples to pack"):
        pack([])
    with pytest.raises(ValueError, match=r"model\.vision\.frame_size"):
        pack([make_sample("a", 6, frames=1, size=4), make_sample("b", 6, frames=1, size=8)])
