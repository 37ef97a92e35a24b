"""Decoding a video into a few square frames with their times, through PyAV.

A frame becomes RGB at its own size, is turned upright, and is then scaled to ``frame_size`` x ``frame_size``: one tile
per frame, its aspect ratio given up, as the vision tower of Nemotron Nano V2 VL takes video frames. So frames that
somebody else decoded (``frame.to_ndarray(format="rgb24")``) give the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from hybridprune_megatron.data.frame_times import listed_seconds, seconds, timed_packets
from hybridprune_megatron.data.images import to_square, turned
from hybridprune_megatron.data.media import MAX_FRAME_PIXELS, MAX_FRAMES, MIN_SIDE, MediaError, check_size, open_video

SAMPLING_MODES = ("uniform", "fps")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken.

    Attributes:
        mode: ``uniform`` takes ``num_frames`` frames, the first and the last among them, evenly by index; ``fps``
            takes the frame shown at every 1/fps seconds, and evenly in time over the whole video where that were more
            than ``max_frames``. Every frame keeps its own time: a variable frame rate shows in the timestamps.
        num_frames: for ``uniform``.
        fps: frames a second, for ``fps``.
        max_frames: the cap, for ``fps``.
    """

    mode: str = "uniform"
    num_frames: int = 16
    fps: float = 2.0
    max_frames: int = 128

    def __post_init__(self) -> None:
        if self.mode not in SAMPLING_MODES:
            raise ValueError(f"data.sampling={self.mode!r}: choose one of {', '.join(SAMPLING_MODES)}")
        for name in ("num_frames", "fps", "max_frames"):
            if getattr(self, name) <= 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be above 0")

    def taken(self, seconds: Sequence[float]) -> list[float]:
        """Times of the frames to take, of those of all frames; see ``choose``."""
        return [seconds[index] for index in self.choose(seconds)]

    def at_most(self, frames: int) -> FrameSampling:
        """The same, with no more frames of a video than so many."""
        return replace(self, num_frames=min(self.num_frames, frames), max_frames=min(self.max_frames, frames))

    @property
    def overrides(self) -> str:
        """The overrides that set it."""
        if self.mode == "uniform":
            return f"data.sampling=uniform data.num_frames={self.num_frames}"
        return f"data.sampling=fps data.fps={self.fps:g} data.max_frames={self.max_frames}"

    def choose(self, seconds: Sequence[float]) -> list[int]:
        """Indices of the frames to take, rising and without repeats.

        Args:
            seconds: times of all frames of the video, rising, the first at 0.
        """
        count = len(seconds)
        if self.mode == "uniform":
            if count <= self.num_frames:
                return list(range(count))
            return [round(float(index)) for index in np.linspace(0, count - 1, self.num_frames)]
        # A frame is shown from its own time until the next frame's; the small slack absorbs rounded time bases.
        num_targets = int(np.floor(seconds[-1] * self.fps + 1e-6)) + 1
        if num_targets <= self.max_frames:
            targets = np.arange(num_targets) / self.fps
        else:
            targets = np.linspace(0.0, seconds[-1], self.max_frames)
        shown = np.searchsorted(np.asarray(seconds), targets + 1e-6, side="right") - 1
        return sorted({int(index) for index in shown})


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of a video.

    Attributes:
        frames: uint8 [F, 3, S, S], RGB, upright.
        seconds: F times in seconds; the first frame of the video is at 0.
        video_seconds: times of all frames of the video.
    """

    frames: Tensor
    seconds: list[float]
    video_seconds: list[float]


def decode_video(
    source: bytes | str | Path, sampling: FrameSampling, frame_size: int, name: str = "video"
) -> DecodedVideo:
    """Decodes the chosen frames of a video.

    Args:
        source: the bytes of a video file, or its path.
        frame_size: side of the output frames, in pixels.
        name: what to call the video in an error.

    Raises:
        ValueError: the video cannot be read, is cut, has no frames, or is larger than videos that are read.
    """
    with _one_error(source, name):
        # The container's times come without decoding, but some containers are wrong about them: those of the decoded
        # frames have the last word, and where they choose other frames, these are fetched in a second pass.
        times = _listed(source)
        times, frames = _decode(source, sampling.choose(times), frame_size)
        chosen = sampling.choose(times)
        if not frames.keys() >= set(chosen):
            times, frames = _decode(source, chosen, frame_size)
        return _decoded([frames[index] for index in chosen], chosen, times)


def sample_frames(
    frames: Sequence[np.ndarray], seconds: Sequence[float], sampling: FrameSampling, frame_size: int
) -> DecodedVideo:
    """The chosen ones of frames that were decoded elsewhere, scaled as ``decode_video`` scales.

    Args:
        frames: F pictures, at least one, each uint8 [H, W, 3], RGB, upright.
        seconds: F times, rising.
        frame_size: side of the output frames, in pixels.

    Raises:
        ValueError: more frames than are read, smaller ones, or infinite times.
    """
    height, width = frames[0].shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"frames of {width} x {height} pixels; at least {MIN_SIDE} on a side are read: scale them up")
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"{len(frames)} frames; at most {MAX_FRAMES} are read: leave some out")
    times = [float(time - seconds[0]) for time in seconds]
    if not math.isfinite(times[-1]):
        raise ValueError(f"frames up to {times[-1]} s: times must be finite")
    chosen = sampling.choose(times)
    return _decoded([to_square(frames[index], frame_size) for index in chosen], chosen, times)


def list_frames(source: bytes | str | Path, name: str = "video") -> list[float]:
    """The times that the frames of a video most likely have, without decoding; a sampling takes some (``taken``).

    They come from the container's index, which some files get wrong; compare with the times of the decoded video.

    Raises:
        ValueError: the video cannot be read, is cut, has no frames, or is larger than videos that are read.
    """
    with _one_error(source, name):
        return _listed(source)


def check_video(source: bytes | str | Path, name: str = "video") -> None:
    """Decodes all of a video as training does, whatever frames it takes there.

    Raises:
        ValueError: training cannot use it.
    """
    decode_video(source, FrameSampling(num_frames=2), 16, name)


def video_seconds(source: bytes | str | Path, name: str = "video") -> list[float]:
    """Times of all frames of a video, as ``DecodedVideo.video_seconds``; decodes all of it.

    Raises:
        ValueError: the video cannot be read, is cut, has no frames, or is larger than videos that are read.
    """
    with _one_error(source, name):
        return _decode(source, (), 1)[0]


def every_frame(source: bytes | str | Path, name: str = "video") -> Iterator[np.ndarray]:
    """All frames of a video in the order in which they are shown, each uint8 [H, W, 3], RGB, upright.

    Raises:
        ValueError: the video cannot be read, is cut, or is larger than videos that are read.
    """
    with _one_error(source, name), open_video(source) as (container, stream):
        for packet in timed_packets(container, stream):
            for number, frame in enumerate(packet.decode()):
                check_size(number, frame.width, frame.height)
                yield _upright(frame)


@contextmanager
def _one_error(source: bytes | str | Path, name: str) -> Iterator[None]:
    """Makes one line of whatever FFmpeg has to say."""
    if isinstance(source, str | Path):
        name = " ".join(str(source).split())
    try:
        yield
    except MediaError as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    except av.error.ArgumentError as error:
        # A decoder's whole answer to both.
        reason = f"broken, or frames of more than {MAX_FRAME_PIXELS} pixels, the most that are read"
        raise ValueError(f"{name} cannot be decoded: {reason}") from error
    except (av.error.FFmpegError, OSError, EOFError, ArithmeticError, IndexError, MemoryError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"{name} cannot be decoded ({reason}): expected a readable video file with frames") from error


def _listed(source: bytes | str | Path) -> list[float]:
    with open_video(source) as (container, stream):
        times = listed_seconds(container, stream)
    if not times:
        raise MediaError("no frame in it")
    return times


def _decode(
    source: bytes | str | Path, chosen: Collection[int], frame_size: int
) -> tuple[list[float], dict[int, Tensor]]:
    """Decodes the whole video and keeps the chosen pictures.

    Returns:
        The times of all frames in seconds, and uint8 [3, S, S] pictures by their number.
    """
    wanted = set(chosen)
    ticks: list[int | None] = []
    pictures: dict[int, Tensor] = {}
    with open_video(source) as (container, stream):
        for packet in timed_packets(container, stream):
            for frame in packet.decode():
                if len(ticks) in wanted:
                    pictures[len(ticks)] = to_square(_upright(frame), frame_size)
                ticks.append(frame.pts)
                check_size(len(ticks), frame.width, frame.height)
        if not ticks:
            raise MediaError("no frame in it")
        return seconds(ticks, stream), pictures


def _decoded(pictures: Sequence[Tensor], chosen: Sequence[int], times: list[float]) -> DecodedVideo:
    return DecodedVideo(torch.stack(list(pictures)), [times[index] for index in chosen], times)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], RGB, as players turn and mirror it."""
    # One thread: the scaler's thread pool does not survive a fork, and a loader process would wait for it forever.
    picture = frame.to_ndarray(format="rgb24", threads=1)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # A pixel at (x, y) is shown at (a x + c y, b x + d y), up to where the picture starts; y points down.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return turned(picture, False, a < 0, d < 0)
    return turned(picture, True, c < 0, b < 0)
