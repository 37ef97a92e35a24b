"""Clips whose frames tell their number and which way up they are, and changes to the boxes of an MP4."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

#: Colours of the quadrants: top left, top right, bottom left, bottom right.
UPRIGHT = ("red", "green", "blue", "grey")


def quadrants(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [count, H, W, 3]: quadrants of `UPRIGHT`, of level 16 + 8 i in frame i."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    level = (16 + 8 * np.arange(count, dtype=np.uint8))[:, None, None]
    y, x = height // 2, width // 2
    frames[:, :y, :x, 0] = frames[:, :y, x:, 1] = frames[:, y:, :x, 2] = level
    frames[:, y:, x:] = level[..., None]
    return frames


def seen(frame: Any) -> tuple[str, ...]:
    """The colours of the quadrants of a picture [3, S, S]."""
    side = frame.shape[-1]
    names = []
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        colour = frame[:, y * side // 4, x * side // 4].tolist()
        bright = [value > max(colour) / 2 for value in colour]
        names.append({1: ("red", "green", "blue")[bright.index(True)], 3: "grey"}[sum(bright)])
    return tuple(names)


def numbers(frames: Any) -> list[int]:
    """Which frames of `quadrants` these upright pictures [F, 3, S, S] are."""
    side = frames.shape[-1]
    return [round((float(frame[:, side * 5 // 8 :, side * 5 // 8 :].float().mean()) - 16) / 8) for frame in frames]


def encode(
    file_format: str,
    codec: str,
    frames: np.ndarray | None = None,
    rate: int = 25,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
) -> bytes:
    """A clip, by default 24 frames of `quadrants`, at ``rate`` frames a second.

    Args:
        file_format: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder.
        frames: uint8 [F, H, W, 3].
        rate: frames a second.
        pix_fmt: as which pixels they are stored.
        options: of the encoder.
        container_options: of the container.
        prepare: sets more on the stream before the first frame.
    """
    frames = quadrants(24) if frames is None else frames
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        # Enough to tell the frames by their levels.
        stream.codec_context.bit_rate = 8_000_000
        prepare(stream)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def video_table(*names: bytes) -> tuple[bytes, ...]:
    """The path of a table of an MP4's first track, or of a box below its tables."""
    return (b"moov", b"trak", b"mdia", b"minf", b"stbl", *names)


def find_box(clip: bytes, *path: bytes) -> tuple[int, int]:
    """Start and stop of a box, its header included; the first of each name on the way."""
    position, stop = 0, len(clip)
    start = 0
    for name in path:
        while clip[position + 4 : position + 8] != name:
            position += int.from_bytes(clip[position : position + 4], "big")
            assert position < stop, f"no box {name!r}"
        start, stop = position, position + int.from_bytes(clip[position : position + 4], "big")
        position += 8
    return start, stop


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def replace_box(clip: bytes, path: Sequence[bytes], new: bytes) -> bytes:
    """Puts other bytes in the place of a box that lies after the media data, and mends the sizes around it."""
    start, stop = find_box(clip, *path)
    changed = bytearray(clip)
    for depth in range(1, len(path)):
        outer, _ = find_box(clip, *path[:depth])
        size = int.from_bytes(clip[outer : outer + 4], "big") + len(new) - (stop - start)
        changed[outer : outer + 4] = struct.pack(">I", size)
    changed[start:stop] = new
    return bytes(changed)


def fast_start(clip: bytes) -> bytes:
    """An MP4 with its tables before the media data, so that a cut clip still has them."""
    start, stop = find_box(clip, b"moov")
    table, end = find_box(clip, *video_table(b"stco"))
    moov = bytearray(clip[start:stop])
    for place in range(table - start + 16, end - start, 4):
        offset = int.from_bytes(moov[place : place + 4], "big") + len(moov)
        moov[place : place + 4] = struct.pack(">I", offset)
    data, _ = find_box(clip, b"mdat")
    return clip[:data] + bytes(moov) + clip[data:start] + clip[stop:]


def patch(clip: bytes, position: int, new: bytes) -> bytes:
    return clip[:position] + new + clip[position + len(new) :]
