"""Decoding: the right frames and times from regular, irregular and broken videos."""

import io
import re
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from hybridprune_megatron.data.video import FrameSampling, decode_video, list_frames
from studies.needles.needles import clip_paths

from .conftest import encode_clip, frame_indices, grey_frames

UNIFORM = FrameSampling("uniform", num_frames=5)


def regular(count: int, step_ms: int = 40) -> list[int]:
    return [index * step_ms for index in range(count)]


def test_uniform_takes_first_and_last_and_evenly_between() -> None:
    clip = encode_clip(grey_frames(21), regular(21))
    decoded = decode_video(clip, UNIFORM, 16)
    assert decoded.frames.shape == (5, 3, 16, 16)
    assert decoded.frames.dtype == torch.uint8
    assert frame_indices(decoded.frames, 21) == [0, 5, 10, 15, 20]
    assert decoded.seconds == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_fewer_frames_than_asked_gives_all() -> None:
    decoded = decode_video(encode_clip(grey_frames(3), regular(3)), UNIFORM, 16)
    assert frame_indices(decoded.frames, 3) == [0, 1, 2]


def test_one_frame() -> None:
    clip = encode_clip(grey_frames(2)[:1], [0])
    for sampling in (UNIFORM, FrameSampling("fps", fps=2.0)):
        assert decode_video(clip, sampling, 16).seconds == [0.0]


def test_reordered_frames_come_in_order_of_display() -> None:
    frames = grey_frames(24)
    clip = encode_clip(frames, regular(24), gop=24)
    with av.open(io.BytesIO(clip)) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert packets != sorted(packets), "the clip has no B-frames: the test would show nothing"
    decoded = decode_video(clip, FrameSampling("uniform", num_frames=24), 16)
    assert frame_indices(decoded.frames, 24) == list(range(24))


def test_variable_frame_rate_shows_in_the_times() -> None:
    # Two frames in the first second, then a frame every 100 ms.
    times = [0, 500, *range(1000, 2000, 100)]
    clip = encode_clip(grey_frames(12), times)
    decoded = decode_video(clip, FrameSampling("uniform", num_frames=12), 16)
    assert decoded.seconds == pytest.approx([time / 1000 for time in times], abs=2e-3)
    by_time = decode_video(clip, FrameSampling("fps", fps=2.0), 16)
    # What is shown at 0, 0.5, 1 and 1.5 s.
    assert frame_indices(by_time.frames, 12) == [0, 1, 2, 7]
    assert by_time.seconds == pytest.approx([0.0, 0.5, 1.0, 1.5], abs=2e-3)


def test_a_frame_that_stays_is_taken_once() -> None:
    clip = encode_clip(grey_frames(3), [0, 2000, 2100])
    decoded = decode_video(clip, FrameSampling("fps", fps=2.0), 16)
    assert frame_indices(decoded.frames, 3) == [0, 1]


def test_fps_stops_at_the_cap_and_then_spans_the_whole_video() -> None:
    clip = encode_clip(grey_frames(51), regular(51, 100))
    assert len(decode_video(clip, FrameSampling("fps", fps=2.0, max_frames=11), 8).seconds) == 11
    capped = decode_video(clip, FrameSampling("fps", fps=2.0, max_frames=6), 8)
    assert capped.seconds == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], abs=2e-3)


def test_times_start_at_zero_for_a_video_that_starts_later() -> None:
    clip = encode_clip(grey_frames(5), [3000 + time for time in regular(5)], file_format="matroska")
    assert decode_video(clip, UNIFORM, 8).seconds == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16], abs=2e-3)


def test_probe_tells_the_times_of_the_decoded_frames() -> None:
    clip = encode_clip(grey_frames(30), [0, 30, *range(200, 3000, 100)])
    for sampling in (UNIFORM, FrameSampling("fps", fps=3.0), FrameSampling("fps", fps=10.0, max_frames=7)):
        assert sampling.taken(list_frames(clip)) == decode_video(clip, sampling, 8).seconds


@pytest.mark.parametrize("path", clip_paths(), ids=lambda path: path.stem)
def test_real_clips(path: Path) -> None:
    decoded = decode_video(path, FrameSampling("uniform", num_frames=8), 32)
    assert decoded.frames.shape == (8, 3, 32, 32)
    assert decoded.seconds[0] == 0.0
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    last = float((frames[-1].pts - frames[0].pts) * frames[0].time_base)
    assert decoded.seconds[-1] == pytest.approx(last)
    assert all(later > earlier for earlier, later in pairwise(decoded.seconds))


def test_bytes_and_path_give_the_same(tmp_path: Path) -> None:
    clip = encode_clip(grey_frames(9), regular(9))
    (tmp_path / "clip.mp4").write_bytes(clip)
    from_path = decode_video(tmp_path / "clip.mp4", UNIFORM, 16)
    assert torch.equal(from_path.frames, decode_video(clip, UNIFORM, 16).frames)


def test_broken_videos_are_one_clear_line(tmp_path: Path) -> None:
    clip = encode_clip(grey_frames(9), regular(9))
    audio_only = tmp_path / "sound.wav"
    with av.open(str(audio_only), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    damaged = bytearray(clip)
    start = clip.index(b"mdat") + 8
    damaged[start : start + 4000] = bytes(4000)
    for source in (b"", b"no video" * 50, clip[: len(clip) // 4], tmp_path / "none.mp4", audio_only, bytes(damaged)):
        with pytest.raises(ValueError, match="cannot be decoded") as caught:
            decode_video(source, UNIFORM, 16, name="clip 7")
        assert "\n" not in str(caught.value)
        name = str(source) if isinstance(source, Path) else "clip 7"
        assert re.match(re.escape(name), str(caught.value))


def test_sources_are_files_never_addresses() -> None:
    with pytest.raises(ValueError, match="no such file"):
        decode_video("http://localhost/clip.mp4", UNIFORM, 16)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"mode": "random"}, r"data\.sampling='random'"),
        ({"num_frames": 0}, r"data\.num_frames=0"),
        ({"fps": 0.0}, r"data\.fps=0\.0"),
        ({"max_frames": -1}, r"data\.max_frames=-1"),
    ],
)
def test_sampling_is_checked(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        FrameSampling(**fields)
