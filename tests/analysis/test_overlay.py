"""The clip as a video with dropped patches in grey: whose frames, at which times, and what is grey."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from hybridprune_megatron.analysis.overlay import write_overlay
from hybridprune_megatron.analysis.strip import KeptPatches
from hybridprune_megatron.data.video import FrameSampling
from tests.data.conftest import encode_clip

#: Milliseconds: the clip's frame rate varies.
TIMES = (0, 40, 100, 300, 340, 900)
SAMPLING = FrameSampling("uniform", num_frames=2)
PANEL = (320, 360)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Six red frames, higher than wide."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(np.full((6, 72, 64, 3), (250, 10, 10), dtype=np.uint8), TIMES))
    return path


def clip(title: str = "What is it?") -> KeptPatches:
    """Two frames of four tokens; layer 1 has lost the first frame but for its upper right token."""
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[1, :4] = torch.tensor([False, True, False, False])
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    return KeptPatches(pixels, torch.arange(8) // 4, kept, "M*", title)


def read(path: Path) -> tuple[list[int], list[np.ndarray]]:
    """Milliseconds and pictures."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return [round(1000 * frame.time) for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def is_red(picture: np.ndarray, row: float, column: float) -> bool:
    """At a share of the height and of the width of a panel."""
    height, width = picture.shape[:2]
    red, green, _ = picture[int(row * height), int(column * width)].astype(int)
    return red - green > 100


def test_every_frame_has_its_own_time_and_what_was_kept_of_the_frame_before_it(video: Path, tmp_path: Path) -> None:
    write_overlay(tmp_path / "out" / "overlay.mp4", video, SAMPLING, clip())
    times, pictures = read(tmp_path / "out" / "overlay.mp4")
    assert times == list(TIMES)
    assert len(list((tmp_path / "out").iterdir())) == 1
    width, height = PANEL
    assert pictures[0].shape[1] == 2 * width + 8
    for number, picture in enumerate(pictures):
        full, reduced = picture[-height:, :width], picture[-height:, -width:]
        corners = [(row, column) for row in (0.25, 0.75) for column in (0.25, 0.75)]
        assert all(is_red(full, *place) for place in corners)
        # The model was shown the first frame and the last: the first stands for all up to the last.
        wanted = [False, True, False, False] if number < 5 else [True] * 4
        assert [is_red(reduced, *place) for place in corners] == wanted, number
        # The question and the names of the panels.
        assert (picture[:-height] < 100).any()


def test_chosen_layers_and_long_questions(video: Path, tmp_path: Path) -> None:
    write_overlay(tmp_path / "overlay.mp4", video, SAMPLING, clip("Why $x_1$ and not $y$? " * 20), layers=[1])
    _, pictures = read(tmp_path / "overlay.mp4")
    assert pictures[0].shape[1] == PANEL[0]
    assert pictures[0].shape[0] > PANEL[1] + 100
    assert not is_red(pictures[0][-PANEL[1] :], 0.25, 0.25)


def test_another_video_is_refused_and_leaves_nothing(video: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 frames are shown of it, and the model saw 2"):
        write_overlay(tmp_path / "overlay.mp4", video, FrameSampling("uniform", num_frames=3), clip())
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:900])
    with pytest.raises(ValueError, match="cannot be decoded"):
        write_overlay(tmp_path / "overlay.mp4", tmp_path / "broken.mp4", SAMPLING, clip())
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "broken.mp4"}
