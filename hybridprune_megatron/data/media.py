"""The only entry point for media from elsewhere: videos by PyAV, images by Pillow.

FFmpeg reads playlists, scripts and addresses as willingly as videos, and what they name is opened too: other files,
sockets. So only containers that hold their own pictures are opened, and no protocol at all: FFmpeg gets the bytes of
one file and never a name.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.stream import Disposition

#: Most frames of a video: nine hours at 30 frames a second.
MAX_FRAMES = 2**20
#: Fewest pixels on a side of a frame.
MIN_SIDE = 8
#: Most pixels of a frame: 8192 x 4096.
MAX_FRAME_PIXELS = 2**25
#: Most pixels of all frames of a video together: four hours of 1920 x 1080 at 30 frames a second, and some.
MAX_VIDEO_PIXELS = 2**40
#: Most pixels of an image: 8192 x 8192.
MAX_IMAGE_PIXELS = 2**26

#: Most streams of any kind in a file: each costs time and memory before the first is read.
MAX_STREAMS = 128

#: FFmpeg's names of the containers and raw streams that are read.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,gif,flv,asf,ogg"
_CONTAINER_HINT = "give mp4, mov, mkv, webm, avi, mpg, ts, gif, flv, wmv or ogv"
_OPTIONS = {
    "format_whitelist": _CONTAINERS,
    # FFmpeg has no protocol of this name, so none may be opened.
    "protocol_whitelist": "none",
    # Tracks of a MOV file may lie in other files.
    "enable_drefs": "0",
    "max_streams": str(MAX_STREAMS),
    "max_pixels": str(MAX_FRAME_PIXELS),
    # A clock that starts again (joined files) is not one that ran over: `frame_times` handles both.
    "correct_ts_overflow": "0",
}
#: The end of a picture's data and the trailer of the file.
_GIF_END = b"\0;"
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")


class MediaError(Exception):
    """Media that are not read; one line with the reason and what is allowed."""


@contextmanager
def open_video(source: bytes | str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video file and chooses its video: the container's default one, never a cover picture.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        MediaError: not a container that is read, no video in it, or one beyond the limits.
        av.error.FFmpegError, OSError: it cannot be read.
    """
    with _file(source) as file:
        _check_gif(file)
        try:
            container = av.open(file, mode="r", options=_OPTIONS)
        except av.error.ArgumentError as error:
            # FFmpeg's whole answer to what is not on the list.
            raise MediaError(f"not a kind of video file that is read: {_CONTAINER_HINT}") from error
        except av.error.MemoryError as error:
            raise MediaError(
                f"no memory for its streams, or more than {MAX_STREAMS}, the most that are read"
            ) from error
        with container:
            stream = _default_video(container)
            check_size(max(stream.frames, len(stream.index_entries)), stream.width, stream.height)
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            # Slice threads only: frame threads buy little on short clips and a loader has processes of its own.
            stream.thread_type = "SLICE"
            yield container, stream


def check_size(frames: int, width: int, height: int) -> None:
    """Refuses a video that would take too long or too much memory.

    Args:
        frames: how many it has, or how many its header promises.
        width, height: of a frame, in pixels.

    Raises:
        MediaError: with the limit.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(
            f"frames of {width} x {height} pixels; at most {MAX_FRAME_PIXELS} pixels are read: scale it down"
        )
    # A size of 0 is one that only the decoder knows.
    if 0 < min(width, height) < MIN_SIDE:
        raise MediaError(f"frames of {width} x {height} pixels; at least {MIN_SIDE} on a side are read: scale it up")
    if frames > MAX_FRAMES:
        raise MediaError(
            f"at least {frames} frames; at most {MAX_FRAMES} are read: cut it into parts, or lower its frame rate"
        )
    if frames * width * height > MAX_VIDEO_PIXELS:
        raise MediaError(
            f"at least {frames} frames of {width} x {height} pixels; at most {MAX_VIDEO_PIXELS} pixels are read: "
            "scale it down, or cut it into parts"
        )


@contextmanager
def open_image(source: bytes | str | Path) -> Iterator[Any]:
    """Opens an image file: a PIL image, its pixels not decoded yet.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        MediaError: not an image format that is read, or more pixels than are.
        OSError: it cannot be read.
    """
    Image = _pillow()
    with _file(source) as file:
        try:
            # Pillow warns of large images, below a limit of its own, and of broken notes in a file.
            with warnings.catch_warnings(action="ignore"):
                image = Image.open(file, formats=_IMAGE_FORMATS)
        except Image.UnidentifiedImageError as error:
            raise MediaError(f"not an image that is read: give {', '.join(_IMAGE_FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise MediaError(f"too large; at most {MAX_IMAGE_PIXELS} pixels are read: scale it down") from error
        check_image_size(*image.size)
        with image:
            yield image


def check_image_size(width: int, height: int) -> None:
    """Refuses an image of more than ``MAX_IMAGE_PIXELS``.

    Raises:
        MediaError: with the limit.
    """
    if width * height > MAX_IMAGE_PIXELS:
        raise MediaError(f"{width} x {height} pixels; at most {MAX_IMAGE_PIXELS} pixels are read: scale it down")


@contextmanager
def _file(source: bytes | str | Path) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        if not source:
            raise MediaError("empty: 0 bytes")
        yield io.BytesIO(source)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError("no such file")
    if not path.is_file():
        # Pipes and devices never end.
        raise MediaError("not a file: give the path of one")
    if not path.stat().st_size:
        raise MediaError("empty: 0 bytes")
    # By number: FFmpeg would guess formats from a name, and a file is read by what it holds.
    with open(os.open(path, os.O_RDONLY), "rb") as file:
        yield file


def _check_gif(file: BinaryIO) -> None:
    """Refuses a GIF that was cut: FFmpeg shows what is left of it without an error."""
    if file.read(4) == b"GIF8" and not file.read().rstrip(b"\0\r\n ").endswith(_GIF_END):
        raise MediaError("cut: a GIF ends in a trailer, which is missing")
    file.seek(0)


def _default_video(container: av.container.InputContainer) -> av.VideoStream:
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise MediaError("no video in it" + (" but a cover picture" if container.streams.video else ""))
    chosen = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    if chosen.codec_context is None:
        raise MediaError("no decoder for its video")
    return chosen


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MediaError("images need Pillow: pip install pillow") from error
    return Image
