"""The clip itself with what each depth has dropped greyed out, as a video."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from hybridprune_megatron.analysis.strip import KeptPatches, chosen_layers, grey_out, wrapped
from hybridprune_megatron.config.outputs import whole_file
from hybridprune_megatron.data.video import FrameSampling, every_frame, video_seconds
from hybridprune_megatron.evaluation.figure import new_figure

#: A panel fits into this many pixels, whatever the clip's size.
_PANEL = (640, 360)
_GAP = 8
#: Panels side by side where no layers are named.
_PANELS = 3
_DPI = 100
_TEXT_HEIGHT = 0.19
#: Ticks a second: divisible by every common frame rate, as in most mp4 files.
_CLOCK = 90_000


def write_overlay(
    path: Path, video: Path, sampling: FrameSampling, clip: KeptPatches, layers: Sequence[int] | None = None
) -> None:
    """Writes an mp4 of all frames of a video at their own times, one panel per depth, dropped patches grey.

    A model is shown some of the frames. What it kept of one holds until the next.

    Args:
        path: of the mp4, replaced only when the new one is whole.
        video: what the model was asked about.
        sampling: which of its frames the model was shown.
        layers: rising; None: where everything enters, one in the middle, and the last.

    Raises:
        ValueError: the video cannot be read, or is another one than the model was shown.
    """
    layers = chosen_layers(clip.kept, _PANELS) if layers is None else layers
    times = video_seconds(video)
    shown = sampling.taken(times)
    if len(shown) != clip.num_frames:
        raise ValueError(f"{video}: {len(shown)} frames are shown of it, and the model saw {clip.num_frames}")
    with whole_file(path) as scratch, av.open(scratch, mode="w", format="mp4") as out:
        stream, words = None, np.empty((0, 0, 3), dtype=np.uint8)
        for number, picture in enumerate(every_frame(video)):
            if stream is None:
                size = _panel_size(*picture.shape[:2])
                words = _words(clip, layers, size)
                rate = Fraction(len(times) / times[-1] if times[-1] else 1).limit_denominator(1000)
                stream = out.add_stream("libx264", rate=rate, options={"crf": "18", "threads": "1"})
                stream.width, stream.height = words.shape[1], words.shape[0] + size[0]
                stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, _CLOCK)
            seen = bisect_right(shown, times[number]) - 1
            panels = _panels(picture, [clip.of(layer, seen) for layer in layers], size)
            frame = av.VideoFrame.from_ndarray(np.concatenate([words, panels]), format="rgb24")
            frame.pts, frame.time_base = round(times[number] * _CLOCK), Fraction(1, _CLOCK)
            out.mux(stream.encode(frame))
        assert stream is not None, "video_seconds has seen a frame"
        out.mux(stream.encode())


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a panel, even, as H.264 needs them."""
    scale = min(_PANEL[0] / width, _PANEL[1] / height)
    even_height, even_width = (max(2, 2 * round(size * scale / 2)) for size in (height, width))
    return even_height, even_width


def _panels(picture: np.ndarray, kept: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Uint8 [H, all panels, 3]: the picture once per depth, white between."""
    large = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    between = np.full((size[0], _GAP, 3), 255, dtype=np.uint8)
    parts = [each for mask in kept for each in (between, grey_out(large, mask))]
    return np.concatenate(parts[1:], axis=1)


def _words(clip: KeptPatches, layers: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Uint8 [H, all panels, 3], black on white: the question, and a name above every panel."""
    width = len(layers) * (size[1] + _GAP) - _GAP
    title = wrapped(clip.title, max(10, width // 8))
    # Even, as the whole frame must be.
    height = 2 * round((title.count("\n") + 2.4) * _TEXT_HEIGHT * _DPI / 2)
    figure = new_figure(width / _DPI, height / _DPI, dpi=_DPI)
    figure.set_layout_engine("none")
    figure.text(0.5, 1 - 0.03 / (height / _DPI), title, ha="center", va="top", fontsize=10)
    for number, layer in enumerate(layers):
        middle = (number * (size[1] + _GAP) + size[1] / 2) / width
        name = f"enters layer {clip.name(layer, ': ')}" if size[1] > 200 else clip.name(layer, ": ")
        figure.text(middle, 0.04 / (height / _DPI), name, ha="center", va="bottom", fontsize=9)
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]  # of the Agg canvas
    # The canvas rounds its size; the panels have the last word.
    page = np.full((height, width, 3), 255, dtype=np.uint8)
    page[: drawn.shape[0], : drawn.shape[1]] = drawn[:height, :width]
    return page
