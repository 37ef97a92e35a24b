"""All frames of a video, in the order and at the times at which they are shown, from its default stream."""

import io
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from hybridprune_megatron.data.frame_times import seconds
from hybridprune_megatron.data.video import DecodedVideo, FrameSampling, decode_video, list_frames
from tests.clips import UPRIGHT, encode, numbers, quadrants, seen

EVERY = FrameSampling("uniform", num_frames=1000)


def every_frame(clip: bytes) -> DecodedVideo:
    """All frames, which the container's times announced."""
    decoded = decode_video(clip, EVERY, 32)
    assert all(later > earlier for earlier, later in pairwise(decoded.seconds))
    assert EVERY.taken(list_frames(clip)) == decoded.seconds == decoded.video_seconds
    return decoded


@pytest.mark.parametrize(
    ("codec", "b_frames"), [("libx264", "0"), ("libx264", "3"), ("libx264", "8"), ("mpeg4", "0"), ("mpeg4", "2")]
)
def test_avi_has_decoding_times_only(codec: str, b_frames: str) -> None:
    clip = encode("avi", codec, rate=8, options={"bf": b_frames})
    decoded = every_frame(clip)
    assert numbers(decoded.frames) == list(range(24))
    assert decoded.seconds == [index / 8 for index in range(24)]


@pytest.mark.parametrize("file_format", ["mpeg", "mpegts"])
@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video", "libx264"])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (50, 0), (0, 50), (0, 0.3), (95443.3, 0)])
def test_joined_files_follow_each_other(file_format: str, codec: str, first: float, second: float) -> None:
    """Whatever their clocks say; the last of them runs over in the middle of the first file."""
    parts = [
        encode(file_format, codec, options={"bf": "0"}, container_options={"output_ts_offset": str(offset)})
        for offset in (first, second)
    ]
    decoded = every_frame(b"".join(parts))
    assert numbers(decoded.frames) == [*range(24), *range(24)]
    # A program stream says one time for several small frames, so FFmpeg guesses.
    assert decoded.seconds == pytest.approx(
        [index / 25 for index in range(48)], abs=0.1 if file_format == "mpeg" else 1e-3
    )


@pytest.mark.parametrize("file_format", ["mpeg", "mpegts"])
@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (50, 0), (0, 50), (95443.3, 0)])
def test_joined_files_with_reordered_frames(file_format: str, codec: str, first: float, second: float) -> None:
    parts = [
        encode(file_format, codec, options={"bf": "2"}, container_options={"output_ts_offset": str(offset)})
        for offset in (first, second)
    ]
    decoded = every_frame(b"".join(parts))
    assert numbers(decoded.frames) == [*range(24), *range(24)]
    # The last frames of a program stream may have no time of their own.
    assert decoded.seconds[-1] == pytest.approx(47 / 25, abs=0.1)


def test_times_that_do_not_rise_are_repaired_and_no_frame_is_left_out() -> None:
    class Stream:
        time_base, average_rate, guessed_rate = Fraction(1, 100), Fraction(25), None

    def repaired(ticks: list[int | None]) -> list[float]:
        return seconds(ticks, Stream())

    assert repaired([7, 9, 14]) == [0.0, 0.02, 0.07]
    # Two frames at one time share what is left until the next; at the end they take the nominal 0.04 s.
    assert repaired([0, 4, 4, 8]) == [0.0, 0.04, 0.06, 0.08]
    assert repaired([0, 0, 4, 4, 4]) == [0.0, 0.02, 0.04, 0.08, 0.12]
    assert repaired([0, 12, 4, 8, 16]) == [0.0, 0.04, 0.08, 0.12, 0.16]
    # Without times the nominal rate is all there is, also where it is not known.
    assert repaired([None, None, 5]) == [0.0, 0.04, 0.08]
    Stream.average_rate = None
    assert repaired([None, None]) == [0.0, 0.04]
    assert repaired([]) == []


def test_raw_streams_have_the_nominal_rate() -> None:
    for file_format, codec in (("h264", "libx264"), ("mpeg2video", "mpeg2video"), ("m4v", "mpeg4")):
        decoded = every_frame(encode(file_format, codec))
        assert numbers(decoded.frames) == list(range(24))
        assert decoded.seconds == pytest.approx([index / 25 for index in range(24)])


def streams_of(file_format: str, *dispositions: Disposition) -> bytes:
    """A clip with a video stream for each disposition: 3 magenta frames, but the last one is of 12 `quadrants`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format) as container:
        streams = []
        for disposition in dispositions:
            picture = bool(disposition & Disposition.attached_pic)
            stream = container.add_stream("mjpeg" if picture else "libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p" if picture else "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for stream in streams:
            frames = quadrants(12)
            if stream is not streams[-1]:
                frames = np.full((1 if stream.disposition & Disposition.attached_pic else 3, 48, 64, 3), 200, np.uint8)
                frames[..., 1] = 0
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["mp4", "matroska"])
def test_the_default_stream_is_the_video(file_format: str) -> None:
    none, default = Disposition(0), Disposition.default
    for clip in (streams_of(file_format, none, default), streams_of(file_format, none, none, default)):
        decoded = every_frame(clip)
        assert len(decoded.seconds) == 12
        assert seen(decoded.frames[-1]) == UPRIGHT
    # Without a default or with several it is the first one.
    for clip in (streams_of(file_format, default, default), streams_of("matroska", none, none)):
        assert len(every_frame(clip).seconds) == 3


@pytest.mark.parametrize("file_format", ["mp4", "matroska"])
def test_a_cover_picture_alone_is_not_a_video(file_format: str) -> None:
    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.fromarray(quadrants(1)[0]).save(picture, "PNG")
    with av.open(buffer, "w", format=file_format) as container:
        sound = container.add_stream("aac", rate=16000)
        if file_format == "mp4":
            cover = container.add_stream("png", rate=1)
            cover.height, cover.width, cover.pix_fmt, cover.disposition = 48, 64, "rgb24", Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(quadrants(1)[0], format="rgb24")
            container.mux(cover.encode(frame))
            container.mux(cover.encode(None))
        else:
            container.add_attachment("cover.png", "image/png", picture.getvalue())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ValueError, match="no video in it but a cover picture"):
        decode_video(buffer.getvalue(), EVERY, 32)


def test_a_cover_picture_is_not_the_video() -> None:
    for dispositions in ((Disposition.attached_pic, Disposition(0)), (Disposition.attached_pic, Disposition.default)):
        decoded = every_frame(streams_of("mp4", *dispositions))
        assert len(decoded.seconds) == 12
        assert seen(decoded.frames[-1]) == UPRIGHT
    clip = streams_of("mp4", Disposition.attached_pic, Disposition.default)
    with av.open(io.BytesIO(clip)) as container:
        assert any(stream.disposition & Disposition.attached_pic for stream in container.streams.video)
