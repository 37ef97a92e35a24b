"""Decoding a video into a few square frames with their times, through PyAV.

A frame is resized straight to ``frame_size`` x ``frame_size`` (bicubic, which low-passes when it shrinks): one tile
a frame, its aspect ratio given up, as the vision tower of Nemotron Nano V2 VL takes video frames.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

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
        sampling: which frames.
        frame_size: side of the output frames, in pixels.
        name: what to call the video in an error.

    Raises:
        ValueError: the video cannot be read or has no frames.
    """
    with _one_error(source, name):
        return _decode(source, sampling, frame_size)


def sample_frames(
    frames: np.ndarray, seconds: Sequence[float], sampling: FrameSampling, frame_size: int
) -> DecodedVideo:
    """The chosen ones of frames that were decoded elsewhere, scaled as ``decode_video`` scales.

    Args:
        frames: uint8 [F, H, W, 3], RGB, upright, F of at least 1.
        seconds: F times, rising.
        sampling: which frames.
        frame_size: side of the output frames, in pixels.
    """
    seconds = [float(time - seconds[0]) for time in seconds]
    chosen = sampling.choose(seconds)
    pictures = [
        _picture(av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[index]), format="rgb24"), frame_size)
        for index in chosen
    ]
    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return DecodedVideo(stack, [seconds[index] for index in chosen], seconds)


def probe_video(source: bytes | str | Path, sampling: FrameSampling, name: str = "video") -> list[float]:
    """The times that ``decode_video`` will most likely give its frames, without decoding.

    They come from the container's index, which some files get wrong; compare with the times of the decoded video.

    Raises:
        ValueError: the video cannot be read or has no frames.
    """
    with _one_error(source, name):
        times = _listed_times(source) or _decode_chosen(source, set(), 2)[0]
        if not times:
            raise _NoFrames("no frame in the video stream")
        return _from_first(times[0], sorted(_choose(times, sampling)))


@contextmanager
def _one_error(source: bytes | str | Path, name: str) -> Iterator[None]:
    """Makes one line of whatever FFmpeg has to say."""
    if isinstance(source, str | Path):
        name = str(source)
    try:
        yield
    except (av.error.FFmpegError, OSError, IndexError, EOFError, _NoFrames) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be decoded ({reason}): expected a readable video file with frames") from error


class _NoFrames(Exception):
    """The file has no video stream, or its stream holds no frame."""


def _decode(source: bytes | str | Path, sampling: FrameSampling, frame_size: int) -> DecodedVideo:
    # The container's index gives the frame times without decoding. It can be wrong (edit lists, damaged packets), so
    # the decoded times have the last word: if they differ, the choice is made again from them, in a second pass.
    listed = _listed_times(source)
    times, frames = _decode_chosen(source, _choose(listed, sampling), frame_size)
    if not times:
        raise _NoFrames("no frame in the video stream")
    if times != listed:
        times, frames = _decode_chosen(source, _choose(times, sampling), frame_size)
    chosen = sorted(frames)
    stack = torch.from_numpy(np.stack([frames[time] for time in chosen])).permute(0, 3, 1, 2).contiguous()
    return DecodedVideo(stack, _from_first(times[0], chosen), _from_first(times[0], times))


def _choose(times: Sequence[Fraction], sampling: FrameSampling) -> set[Fraction]:
    if not times:
        return set()
    return {times[index] for index in sampling.choose(_from_first(times[0], times))}


def _from_first(first: Fraction, times: Sequence[Fraction]) -> list[float]:
    """Seconds since the first frame of the video."""
    return [float(time - first) for time in times]


def _open(source: bytes | str | Path) -> av.container.InputContainer:
    if isinstance(source, bytes):
        return av.open(io.BytesIO(source), mode="r")
    # Only real files: FFmpeg would also take URLs and device names.
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return av.open(str(path.resolve()), mode="r")


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise _NoFrames("no video stream")
    return container.streams.video[0]


def _listed_times(source: bytes | str | Path) -> list[Fraction]:
    """Frame times in seconds from the packets, rising; an empty list where a packet has none."""
    with _open(source) as container:
        stream = _video_stream(container)
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if stream.time_base is None or any(packet.pts is None for packet in packets):
            return []
        return sorted({packet.pts * stream.time_base for packet in packets})


def _decode_chosen(
    source: bytes | str | Path, chosen: set[Fraction], frame_size: int
) -> tuple[list[Fraction], dict[Fraction, np.ndarray]]:
    """Decodes the whole stream and keeps the pictures of the chosen times.

    Returns:
        The times of all frames, and uint8 [S, S, 3] pictures by time.
    """
    times: list[Fraction] = []
    pictures: dict[Fraction, np.ndarray] = {}
    with _open(source) as container:
        stream = _video_stream(container)
        # Slice threads only: frame threads buy little on short clips and a loader has processes of its own.
        stream.thread_type = "SLICE"
        for time, frame in _timed_frames(container, stream):
            if times and time <= times[-1]:
                continue
            times.append(time)
            if time in chosen:
                pictures[time] = _picture(frame, frame_size)
    return times, pictures


def _timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    rate = stream.average_rate or Fraction(25)
    for index, frame in enumerate(container.decode(stream)):
        if frame.pts is None:
            # Raw streams carry no times; the nominal rate is all there is.
            yield Fraction(index) / rate, frame
        else:
            yield frame.pts * frame.time_base, frame


def _picture(frame: av.VideoFrame, frame_size: int) -> np.ndarray:
    """uint8 [S, S, 3]: resized, then turned upright, which commute for a square target and right angles."""
    # One thread: the scaler's thread pool does not survive a fork, and a loader process would wait for it forever.
    small = frame.reformat(width=frame_size, height=frame_size, format="rgb24", interpolation="BICUBIC", threads=1)
    picture = small.to_ndarray()
    quarters = round(frame.rotation / 90) % 4
    # rotation counts counterclockwise degrees, as rot90 does.
    return np.ascontiguousarray(np.rot90(picture, quarters)) if quarters else picture
