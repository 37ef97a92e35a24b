"""What a sample shows of its videos and images: tiles, and less of both where a sequence is too short."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybridprune_megatron.config import Config
from hybridprune_megatron.data.images import image_size, num_tiles, read_image, tile_grid, to_square, to_tiles
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleDraft, SampleEncoder
from hybridprune_megatron.data.stored_media import StoredImage
from hybridprune_megatron.data.task_encoder import TrainLoader
from hybridprune_megatron.data.validation_set import ValidationSet
from hybridprune_megatron.method.layout import TokenKind
from tests.data.conftest import encode_clip, grey_frames

MakeConfig = Callable[..., Config]
#: Of a model that knows more than the tests need.
LONG = "data.sequence_length=4096"


def picture(width: int, height: int, orientation: int = 1) -> bytes:
    """A file of noise."""
    noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(noise), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def asked(text: str, answer: str = "dark") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def film() -> bytes:
    """40 frames, a second apart."""
    return encode_clip(grey_frames(40), range(0, 40_000, 1000))


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((512, 512), 12, (1, 1)),
        # Six tenths of the area are enough, so the fewest tiles with them.
        ((1024, 1024), 12, (2, 2)),
        ((640, 640), 12, (1, 1)),
        ((2048, 512), 12, (4, 1)),
        ((512, 2048), 12, (1, 4)),
        ((3000, 1000), 12, (6, 2)),
        ((3000, 1000), 3, (3, 1)),
        ((40, 30), 12, (1, 1)),
        ((4000, 3000), 1, (1, 1)),
    ],
)
def test_a_grid_keeps_area_and_aspect_ratio(size: tuple[int, int], most: int, grid: tuple[int, int]) -> None:
    assert tile_grid(*size, 512, most) == grid


def test_a_grid_is_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for width, height, most in generator.integers(1, [3000, 3000, 13], (200, 3)).tolist():
        found = {}
        for columns in range(1, 13):
            for rows in range(1, 13):
                if columns * rows <= min(most, math.ceil(width * height / 256**2)):
                    area = min(columns * rows * 256**2 / (width * height), 0.6)
                    ratios = sorted((columns / rows, width / height))
                    found[columns, rows] = area * ratios[0] / ratios[1]
        chosen = tile_grid(width, height, 256, most)
        assert found[chosen] == pytest.approx(max(found.values()), rel=1e-12)


def test_tiles_are_cut_row_by_row_with_a_thumbnail_after_them() -> None:
    pixels = read_image(picture(3 * 32, 2 * 32))
    tiles = to_tiles(pixels, 32, 6)
    assert tiles.shape == (7, 3, 32, 32)
    for number in range(6):
        top, left = number // 3 * 32, number % 3 * 32
        assert torch.equal(tiles[number], torch.from_numpy(pixels[top : top + 32, left : left + 32]).permute(2, 0, 1))
    assert torch.equal(tiles[6], to_square(pixels, 32))
    assert torch.equal(to_tiles(pixels, 32, 1), to_square(pixels, 32)[None])


def test_a_size_is_that_of_the_upright_picture() -> None:
    for orientation in (1, 3, 6):
        data = picture(50, 20, orientation)
        height, width = read_image(data).shape[:2]
        assert image_size(data) == (width, height)


def test_an_image_is_shown_in_tiles_between_one_pair_of_marks(demo_config: MakeConfig) -> None:
    data = StoredImage(picture(3 * 128, 2 * 128))
    whole = SampleEncoder(demo_config("data.sequence_length=2048"))
    tiled = SampleEncoder(demo_config("data.sequence_length=2048", "data.max_tiles=12"))
    messages = asked("<image>\nWhich? <image>")
    (one,), (seven,) = (each.encode("k", messages, [data, data]) for each in (whole, tiled))
    assert one.pixel_values.shape[0] == 2
    assert seven.pixel_values.shape[0] == 14
    assert torch.equal(seven.pixel_values[6], one.pixel_values[0])
    # Nothing but visual tokens comes between tiles, and each tile stands for itself.
    text = [
        ids[torch.tensor([kind != TokenKind.FRAME for kind in kinds])]
        for ids, kinds in ((each.input_ids, each.layout.kinds()) for each in (one, seven))
    ]
    assert torch.equal(*text)
    assert seven.layout.frames_per_video() == [1] * 14
    assert seven.layout.num_visual == 7 * one.layout.num_visual


def shrunk(cfg: Config, messages: list[dict[str, Any]], media: list[Any]) -> SampleDraft:
    (draft,) = SampleEncoder(cfg).draft("k", messages, media)
    return draft


def test_a_video_loses_frames_until_it_fits_and_text_stays(demo_config: MakeConfig, film: bytes) -> None:
    settings = ["data.num_frames=40", "data.too_long=shrink", "data.min_frames=3"]
    messages = asked("<video>\nWhich? " + "Look. " * 20)
    whole = shrunk(demo_config(*settings, LONG), messages, [film])
    text = whole.layout.num_tokens - whole.layout.num_visual
    assert whole.layout.frames_per_video() == [40]
    for length in (300, 500, 1000):
        draft = shrunk(demo_config(*settings, f"data.sequence_length={length}"), messages, [film])
        (frames,) = draft.layout.frames_per_video()
        assert 3 <= frames < 40
        # The next frame would not fit.
        per_frame = whole.layout.num_tokens // 40
        assert length - per_frame - 4 < draft.layout.num_tokens <= length
        question = [span for span in draft.layout.spans if span.kind in (TokenKind.QUESTION, TokenKind.ANSWER)]
        assert question == [span for span in whole.layout.spans if span.kind in (TokenKind.QUESTION, TokenKind.ANSWER)]
        (sample,) = SampleEncoder(demo_config(*settings, f"data.sequence_length={length}")).encode(
            "k", messages, [film]
        )
        assert sample.layout == draft.layout
        assert len(sample.pixel_values) == frames
    assert text > 40


@pytest.mark.parametrize("sampling", ["uniform", "fps"])
def test_several_videos_lose_frames_alike(demo_config: MakeConfig, film: bytes, sampling: str) -> None:
    cfg = demo_config(
        f"data.sampling={sampling}",
        *("data.num_frames=40", "data.max_frames=40", "data.fps=1", "data.sequence_length=900"),
        *("data.too_long=shrink", "data.min_frames=2"),
    )
    short = encode_clip(grey_frames(4), range(0, 4000, 1000))
    frames = shrunk(cfg, asked("<video> or <video>\nor <video>?"), [film, short, film]).layout.frames_per_video()
    # The short one has fewer than they are cut to.
    assert frames[0] == frames[2] > frames[1] == 4


def test_frames_come_before_tiles(demo_config: MakeConfig, film: bytes) -> None:
    settings = ["data.num_frames=40", "data.max_tiles=12", "data.too_long=shrink", "data.min_frames=2"]
    large = StoredImage(picture(4 * 128, 3 * 128))
    messages = asked("<video>\n<image>\nWhich?")
    tiles = {}
    for length in (4096, 1000, 500):
        draft = shrunk(demo_config(*settings, f"data.sequence_length={length}"), messages, [film, large])
        frames, *images = draft.layout.frames_per_video()
        tiles[length] = (frames, len(images))
    # All; all frames and the most tiles of 8, 6, 4, 2, 1 that the rest has room for; fewer frames and one tile.
    assert tiles[4096] == (40, 13)
    frames, shown = tiles[1000]
    assert frames == 40
    assert 1 < shown < 13
    frames, shown = tiles[500]
    assert 2 <= frames < 40
    assert shown == 1


def test_what_does_not_fit_with_the_fewest_frames_is_left_out(demo_config: MakeConfig, film: bytes) -> None:
    text = asked("<video>\n" + "Look. " * 300)
    settings = ["data.num_frames=4", "data.min_frames=3", "data.sequence_length=400"]
    with pytest.raises(BadSampleError, match=r"^sample k: \d+ tokens; data.sequence_length=400 is the most$"):
        shrunk(demo_config(*settings, "data.too_long=shrink"), text, [film])
    # And what may not shrink.
    longer = ["data.num_frames=5", "data.sequence_length=400"]
    with pytest.raises(BadSampleError, match=r"\d+ tokens; data.sequence_length=400 is the most"):
        shrunk(demo_config(*longer), asked("<video>\n" + "Look. " * 150), [film])


def test_turns_of_one_conversation_show_the_same_frames(demo_config: MakeConfig, film: bytes) -> None:
    cfg = demo_config(
        *("data.num_frames=40", "data.too_long=shrink", "data.min_frames=2", "data.sequence_length=500"),
        "data.conversation=split_turns",
    )
    drafts = SampleEncoder(cfg).draft("k", [*asked("<video>\nWhich?"), *asked("And then? " * 20)], [film])
    assert len(drafts) == 2
    assert drafts[0].layout.frames_per_video() == drafts[1].layout.frames_per_video()
    assert drafts[0].layout.num_tokens < drafts[1].layout.num_tokens <= 500


COST = ["data.length_counts=cost", "reduction=query", "reduction.budget=0.25"]


def test_by_cost_a_sequence_holds_four_times_as_many_frames(demo_config: MakeConfig, film: bytes) -> None:
    settings = ["data.num_frames=40", "data.too_long=shrink", "data.min_frames=2", "data.sequence_length=200"]
    settings += ["data.frame_text=."]
    by_tokens, by_cost = (
        shrunk(demo_config(*settings, *more), asked("<video>\nWhich?"), [film]) for more in ([], COST)
    )
    encoder = SampleEncoder(demo_config(*settings, *COST))
    visual = by_cost.layout.num_visual
    assert encoder.counted(by_cost.layout) == by_cost.layout.num_tokens - visual + math.ceil(visual / 4) <= 200
    # Less than four times, for the texts of frames are not dropped.
    assert 2 < visual / by_tokens.layout.num_visual < 4


def test_packs_are_filled_by_cost(demo_config: MakeConfig) -> None:
    cfg = demo_config(*COST, "data.packing_buffer=13", "trainer.eval_samples=5")
    encoder = SampleEncoder(cfg)
    loader = TrainLoader(cfg, 0, 1)
    batches = list(islice(loader, 6))
    for batch in batches:
        assert sum(encoder.counted(layout) for layout in batch.layouts) <= 320
        assert len(batch.input_ids) <= cfg.longest_sequence == 1280
    assert max(len(batch.input_ids) for batch in batches) > 1.5 * 320
    assert "shrunk" not in loader.counts
    (first, *_) = ValidationSet(cfg).plan()
    assert sum(each.tokens for each in first) <= 320


def test_drawn_budgets_count_as_the_largest(demo_config: MakeConfig) -> None:
    for settings, cost in (
        (["tuning.budget.distribution=uniform", "tuning.budget.low=0.2", "tuning.budget.high=0.5"], 0.5),
        (["tuning.budget.distribution=choice", "tuning.budget.choices=[0.3,0.4]"], 0.4),
        ([], 0.25),
    ):
        assert demo_config(*COST, *settings).visual_cost == cost
    assert demo_config("data.length_counts=cost").visual_cost == 1
    assert demo_config("reduction=query", "reduction.budget=0.25").visual_cost == 1


def test_a_sequence_longer_than_the_model_takes_is_one_line(demo_config: MakeConfig) -> None:
    line = r"holds 16384 tokens \(data.length_counts=cost\), which must not exceed model.max_sequence_length=\d+"
    with pytest.raises(ValueError, match=line):
        demo_config(*COST, "data.sequence_length=4096", "model.max_sequence_length=8192")
    with pytest.raises(ValueError, match=r"data.min_frames=8: at 16 tokens a frame one video fills 128 tokens"):
        demo_config("data.num_frames=40", "data.too_long=shrink", "data.sequence_length=120")


def test_tiles_are_counted_before_the_image_is_decoded(demo_config: MakeConfig) -> None:
    assert num_tiles((1, 1)) == 1
    assert num_tiles((3, 2)) == 7
    for width, height, orientation in ((300, 500, 1), (300, 500, 6), (129, 128, 1), (1000, 90, 8)):
        encoder = SampleEncoder(demo_config("data.sequence_length=2048", "data.max_tiles=12"))
        data = StoredImage(picture(width, height, orientation))
        (draft,) = encoder.draft("k", asked("<image>?"), [data])
        assert encoder.finish(draft).layout == draft.layout


def test_samples_that_shrink_are_counted(demo_config: MakeConfig) -> None:
    loader = TrainLoader(demo_config("data.too_long=shrink", "data.min_frames=1", "data.sequence_length=80"), 0, 1)
    batches = list(islice(loader, 6))
    assert all(len(batch.input_ids) <= 80 for batch in batches)
    assert loader.counts["shrunk"] == loader.counts["seen"] > 0
