"""Media from somewhere else: nothing but the file itself is opened, and what is too large or cut is refused at once."""

from __future__ import annotations

import ast
import ctypes
import io
import os
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from hybridprune_megatron.data import media
from hybridprune_megatron.data.images import read_image
from hybridprune_megatron.data.video import FrameSampling, check_video, decode_video, list_frames, sample_frames
from tests.clips import box, encode, fast_start, find_box, patch, quadrants, replace_box, video_table
from tests.tracked import ROOT

UNIFORM = FrameSampling("uniform", num_frames=4)
#: Seconds that a refusal may take: of the processor, and by the clock of a busy machine (an SDP file waits 20 s).
COMPUTING, WAITING = 1.0, 8.0


def refusal(read: Callable[[], Any]) -> str:
    """The one line that refuses something, which comes at once."""
    start = time.process_time(), time.perf_counter()
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        read()
    assert time.process_time() - start[0] < COMPUTING
    assert time.perf_counter() - start[1] < WAITING
    assert type(caught.value) is ValueError, caught.type
    return str(caught.value)


def refused_video(source: bytes | str | Path) -> str:
    """The line that refuses a video, the same for every way of reading it."""
    lines = {refusal(lambda: UNIFORM.taken(list_frames(source))), refusal(lambda: check_video(source))}
    assert len(lines) == 1, lines
    return lines.pop()


@contextmanager
def unopened(*paths: Path) -> Iterator[None]:
    """Asserts that nobody opens these files meanwhile, FFmpeg and its kind included."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0
    in_open = 0x20
    for path in paths:
        assert libc.inotify_add_watch(watch, os.fsencode(path), in_open) >= 0
    try:
        yield
        with pytest.raises(BlockingIOError):
            os.read(watch, 4096)
    finally:
        os.close(watch)


# Names and scripts that lead elsewhere


SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{clip}'\n",
    "ffconcat of text": "ffconcat version 1.0\nfile '{text}'\n",
    "m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{clip}\n#EXT-X-ENDLIST\n",
    "m3u8 to the network": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "rtsp redirect": "RTSPtextRTSP://127.0.0.1:{port}/a\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT3S">\n<Period><AdaptationSet mimeType="video/mp4"><Representation id="1">\n'
    "<BaseURL>{clip}</BaseURL></Representation></AdaptationSet></Period></MPD>\n",
    "imf": '<?xml version="1.0"?>\n<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">\n',
    "vobsub": "# VobSub index file, v7 (do not modify this line!)\nsize: 9x9\ntimestamp: 00:00:00:000, filepos: 0\n",
    "ffmetadata": ";FFMETADATA1\ntitle=x\n",
    "text": "\x1b[31mroot:x:0:0:root:/root:/bin/bash\n" * 40,
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{clip}"/></svg>\n',
    "playlist": "[playlist]\nFile1={clip}\n",
    "lavfi": "testsrc=duration=1:size=64x48:rate=8",
    "pnm": "P3\n2 2\n255\n" + "0 " * 12,
}


@pytest.fixture(scope="module")
def plain() -> bytes:
    return encode("mp4", "libx264")


@pytest.mark.parametrize("extension", ["mp4", "own"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_is_refused_and_what_it_names_stays_closed(
    kind: str, extension: str, plain: bytes, tmp_path: Path
) -> None:
    clip, text = tmp_path / "secret.mp4", tmp_path / "secret.txt"
    clip.write_bytes(plain)
    text.write_text("secret\n" * 500)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        script = SCRIPTS[kind].format(clip=clip, text=text, port=server.getsockname()[1]).encode()
        names = {"ffconcat of text": "ffconcat", "m3u8 to the network": "m3u8", "text": "txt", "dash": "mpd"}
        path = tmp_path / f"clip.{names.get(kind, kind.split()[0]) if extension == 'own' else extension}"
        path.write_bytes(script)
        with unopened(clip, text):
            for source in (script, path):
                assert "not a kind of video" in refused_video(source) or "Invalid data" in refused_video(source)
                refusal(lambda source=source: read_image(source)) if kind != "pnm" else read_image(source)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "name",
    [
        "concat:{clip}|{clip}",
        "subfile:,,start,0,end,900,,:{clip}",
        "file:{clip}",
        "file://{clip}",
        "data:video/mp4;base64,AAAA",
        "http://127.0.0.1:{port}/clip.mp4",
        "tcp://127.0.0.1:{port}",
        "udp://127.0.0.1:{port}",
        "rtsp://127.0.0.1:{port}/",
        "crypto:{clip}",
        "cache:{clip}",
        "pipe:0",
        "fd:0",
        "testsrc=duration=1",
        "/dev/video0",
        "{folder}/frame%d.png",
        "{folder}/*.mp4",
        "{clip}\0.mp4",
        "x" * 5000,
        "",
    ],
)
def test_a_name_is_a_path_and_nothing_else(name: str, plain: bytes, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(plain)
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"frame{index}.png")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        given = name.format(clip=clip, port=server.getsockname()[1], folder=tmp_path)
        with unopened(clip, tmp_path / "frame1.png"):
            refused_video(given)
            refusal(lambda: read_image(given))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for source in (pipe, Path("/dev/zero"), tmp_path):
        assert "not a file" in refused_video(source)
        assert "not a file" in refusal(lambda source=source: read_image(source))


def test_a_track_in_another_file_stays_closed(tmp_path: Path) -> None:
    clip = encode("mov", "libx264")
    other = tmp_path / "other.mov"
    other.write_bytes(clip)
    reference = box(b"dref", struct.pack(">II", 0, 1) + alias_of(str(other).encode()))
    outside = replace_box(clip, (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"), reference)
    with unopened(other):
        assert "no frame" in refused_video(outside)
    # FFmpeg understands the reference: it does not take the track for one of the file's own.
    with av.open(io.BytesIO(outside)) as container:
        assert not [packet for packet in container.demux(video=0) if packet.size]


def alias_of(path: bytes) -> bytes:
    """A data reference to another file, as a Macintosh alias record."""
    name = path.split(b"/")[-1]
    record = bytes(8) + struct.pack(">H", 0) + b"\x04disk".ljust(28, b"\0") + bytes(12)
    record += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">HH", 10, 10) + bytes(16)
    for kind in (2, 18):
        record += struct.pack(">hH", kind, len(path)) + path + b"\0" * (len(path) % 2)
    record += struct.pack(">hH", -1, 0)
    return box(b"alis", struct.pack(">I", 0) + record)


def test_only_one_module_opens_media() -> None:
    """What is read goes through `data.media`; writing clips is another matter."""
    opened = []
    for folder in ("hybridprune_megatron", "scripts", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "av.open(" in text or "Image.open(" in text else ():
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("av.open", "Image.open"):
                    writes = any(keyword.arg == "mode" and "'w'" in ast.unparse(keyword) for keyword in node.keywords)
                    opened += [] if writes else [str(path.relative_to(ROOT))]
    assert opened == ["hybridprune_megatron/data/media.py"] * 2


# Cut files


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
WHOLE = {
    "mp4": lambda: fast_start(encode("mp4", "libx264")),
    "mp4 whose codec hides damage": lambda: fast_start(encode("mp4", "mpeg4")),
    "mp4 in fragments": lambda: encode("mp4", "libx264", container_options=FRAGMENTS, options={"g": "6"}),
    "mov": lambda: fast_start(encode("mov", "mpeg4")),
    "mkv": lambda: encode("matroska", "libx264"),
    "webm": lambda: encode("webm", "libvpx"),
    "avi": lambda: encode("avi", "mpeg4"),
    "avi of stills": lambda: encode("avi", "mjpeg", pix_fmt="yuvj420p"),
    "flv": lambda: encode("flv", "flv"),
    "gif": lambda: encode("gif", "gif", pix_fmt="rgb8"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_clip_is_refused(kind: str) -> None:
    clip = WHOLE[kind]()
    assert len(decode_video(clip, FrameSampling(num_frames=99), 8).seconds) == 24
    for share in (0.5, 0.75, 0.9):
        refused_video(clip[: int(share * len(clip))])


def test_a_clip_that_is_cut_between_two_frames_is_refused() -> None:
    clip = fast_start(encode("mp4", "mpeg4"))
    with av.open(io.BytesIO(clip)) as container:
        entries = list(container.streams.video[0].index_entries)
    assert "cut" in refused_video(clip[: entries[18].pos])
    clip = encode("avi", "mjpeg", pix_fmt="yuvj420p")
    with av.open(io.BytesIO(clip)) as container:
        entries = list(container.streams.video[0].index_entries)
    assert "its header says 0.960 s, its frames end at 0.720 s" in refused_video(clip[: entries[18].pos])


def test_a_last_frame_that_stays_is_not_a_cut() -> None:
    """Slides: nobody says how long the last one is shown."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture, second in zip(quadrants(3), (0, 4, 8)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = second * 25, 1 / stream.average_rate
            for packet in stream.encode(frame):
                packet.duration = 100
                container.mux(packet)
        container.mux(stream.encode(None))
    assert decode_video(buffer.getvalue(), UNIFORM, 8).seconds == [0.0, 4.0, 8.0]


# Limits


def test_promised_frames_are_limited(plain: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    start, _ = find_box(plain, *video_table(b"stts"))
    line = refused_video(patch(plain, start + 16, struct.pack(">I", 10**9)))
    assert "at least 1000000000 frames; at most 1048576 are read" in line
    # A table of equal sizes takes no room in the file, a fragment's run neither.
    start, _ = find_box(plain, *video_table(b"stsz"))
    refused_video(patch(plain, start + 12, struct.pack(">II", 1, 10**9)))
    avi = encode("avi", "mjpeg", pix_fmt="yuvj420p")
    assert "at least 1000000000 frames" in refused_video(patch(avi, avi.index(b"strh") + 40, struct.pack("<I", 10**9)))
    fragments = encode("mp4", "libx264", container_options=FRAGMENTS)
    run, stop = find_box(fragments, b"moof", b"traf", b"trun")
    for count in (2**20 + 1, 10**9):
        new = box(b"trun", struct.pack(">II", 0, count))
        refused_video(patch(fragments, run, new + box(b"free", bytes(stop - run - len(new) - 8))))
    # Edit lists may show the same frames again and again.
    monkeypatch.setattr(media, "MAX_FRAMES", 100_000)
    edits = box(b"elst", struct.pack(">II", 0, 5000) + struct.pack(">IiI", 3000, 0, 0x10000) * 5000)
    repeated = replace_box(plain, (b"moov", b"trak", b"edts", b"elst"), edits)
    assert "at least 120000 frames" in refused_video(repeated)


@pytest.mark.parametrize("file_format", ["matroska", "mpegts"])
def test_frames_that_no_header_promises_are_counted(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = encode(file_format, "mpeg2video")
    monkeypatch.setattr(media, "MAX_FRAMES", 20)
    assert "at least 21 frames; at most 20 are read: cut it into parts" in refused_video(clip)


def test_pixels_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    gif = encode("gif", "gif", pix_fmt="rgb8")
    gif = patch(gif, 6, struct.pack("<HH", 65535, 65535))
    assert "more than 33554432 pixels" in refusal(lambda: check_video(gif))
    assert "frames of 4 x 32 pixels; at least 8 on a side are read" in refused_video(
        encode("mov", "qtrle", quadrants(2, 32, 4), pix_fmt="rgb24")
    )
    wide = quadrants(2, 32, 2048)
    with monkeypatch.context() as patched:
        patched.setattr(media, "MAX_VIDEO_PIXELS", 100_000)
        line = refused_video(encode("mov", "qtrle", wide, pix_fmt="rgb24"))
        assert "at least 2 frames of 2048 x 32 pixels; at most 100000 pixels are read" in line
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 60_000)
    line = refused_video(encode("mp4", "libx264", wide))
    assert "frames of 2048 x 32 pixels; at most 60000 pixels are read" in line
    # Headers that say less than the frames have: the decoder stops by itself.
    monkeypatch.setitem(media._OPTIONS, "max_pixels", "60000")
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 2**25)
    assert "frames of more than" in refusal(lambda: check_video(encode("avi", "mpeg4", wide)))


def test_frames_given_as_arrays_are_limited() -> None:
    frames = np.zeros((60_000, 8, 8, 3), np.uint8)
    line = refusal(lambda: sample_frames(frames[:, :1, :1], range(60_000), UNIFORM, 8))
    assert "frames of 1 x 1 pixels; at least 8 on a side" in line
    many = np.broadcast_to(frames[:1], (2**20 + 1, 8, 8, 3))
    line = refusal(lambda: sample_frames(many, range(len(many)), UNIFORM, 8))
    assert line == "1048577 frames; at most 1048576 are read: leave some out"
    assert "times must be finite" in refusal(lambda: sample_frames(frames[:2], [0.0, np.inf], UNIFORM, 8))


def test_streams_are_limited(plain: bytes) -> None:
    start, stop = find_box(plain, b"moov", b"trak")
    many = replace_box(plain, (b"moov", b"trak"), plain[start:stop] * 300)
    assert "more than 128" in refused_video(many)


def test_empty_and_meaningless_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    assert refused_video(empty) == f"{empty} cannot be decoded: empty: 0 bytes"
    assert "empty" in refused_video(b"")
    assert "empty" in refusal(lambda: read_image(b""))
    for junk in (
        bytes(100_000),
        b"\xff" * 100_000,
        random.Random(0).randbytes(100_000),
        b"GIF89a",
        b"RIFF\0\0\0\0AVI ",
    ):
        refused_video(junk)
        refusal(lambda junk=junk: read_image(junk))


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "gif"])
def test_damaged_headers_end_in_one_line_or_a_video(kind: str) -> None:
    clip = WHOLE[kind]()
    rng = random.Random(kind)
    values = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x3b\x9a\xca\0", b"\0\xca\x9a\x3b", bytes(4), b"\x80\0\0\0"]
    for _ in range(60):
        changed = bytearray(clip)
        for _ in range(rng.randint(1, 3)):
            position, width = rng.randrange(min(len(clip), 1500) - 4), rng.choice((1, 2, 4))
            changed[position : position + width] = rng.choice(values)[:width]
        try:
            check_video(bytes(changed))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


# Images


def test_an_image_bomb_is_refused_by_its_header() -> None:
    for width, height in ((2**31 - 1, 2**31 - 1), (10**9, 1), (60_000, 60_000), (8193, 8192)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        assert "at most 67108864 pixels are read" in refusal(lambda png=png: read_image(png))
    assert "at most 67108864 pixels are read" in refusal(lambda: read_image(Image.new("1", (8200, 8200))))


@pytest.mark.parametrize("image_format", ["EPS", "PDF", "ICO", "XBM", "MSP", "IM", "PCX", "SGI", "TGA"])
@pytest.mark.filterwarnings("ignore:IM image format")
def test_only_plain_image_formats_are_read(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("1" if image_format in ("XBM", "MSP") else "RGB", (16, 16)).save(buffer, image_format)
    assert "not an image that is read: give JPEG, PNG" in refusal(lambda: read_image(buffer.getvalue()))


def test_a_cut_image_and_broken_exif() -> None:
    buffer = io.BytesIO()
    picture = Image.fromarray(quadrants(24)[20])
    picture.save(buffer, "PNG")
    assert "truncated" in refusal(lambda: read_image(buffer.getvalue()[:-40]))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_image(buffer.getvalue()).shape == (48, 64, 3)
