"""A picture is upright and has the same pixels whichever way it came: as a file, as bytes, decoded by somebody else."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hybridprune_megatron.data.images import read_image, to_square
from hybridprune_megatron.data.video import FrameSampling, decode_video, sample_frames
from tests.clips import UPRIGHT, encode, find_box, patch, quadrants, seen

EVERY = FrameSampling("uniform", num_frames=1000)

#: How a picture is laid down, and the matrix (a, b, c, d) that puts a pixel (x, y) at (a x + c y, b x + d y).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def turned_clip(clip: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Writes a matrix into the track header of an MP4."""
    a, b, c, d = (value << 16 for value in matrix)
    start, _ = find_box(clip, b"moov", b"trak", b"tkhd")
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return patch(clip, start + 48, values)


@pytest.mark.parametrize("orientation", MATRICES)
def test_a_video_is_turned_and_mirrored_as_players_show_it(orientation: int) -> None:
    upright = quadrants(24, 48, 80)
    # Pillow's own table of orientations lays the frames down: every one of them is its inverse but these two.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = np.stack([np.asarray(oriented(Image.fromarray(frame), inverse)) for frame in upright])
    clip = turned_clip(encode("mp4", "libx264", stored, options={"crf": "1"}), MATRICES[orientation])
    decoded = decode_video(clip, EVERY, 32)
    assert seen(decoded.frames[-1]) == UPRIGHT
    # Not a pixel differs from frames that somebody else decoded and turned.
    with av.open(io.BytesIO(clip)) as container:
        given = [np.asarray(oriented(frame.to_image(), orientation)) for frame in container.decode(video=0)]
    assert torch.equal(decoded.frames, sample_frames(given, decoded.seconds, EVERY, 32).frames)


def oriented(image: Image.Image, orientation: int) -> Image.Image:
    """What a viewer makes of an image with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    turned = ImageOps.exif_transpose(image)
    turned.info.pop("exif", None)
    return turned


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2, 2), (1, 0.25)])
def test_a_matrix_that_also_scales_turns_only(scale: tuple[float, float]) -> None:
    clip = encode("mp4", "libx264")
    start, _ = find_box(clip, b"moov", b"trak", b"tkhd")
    x, y = (int(value * 65536) for value in scale)
    mirrored = patch(clip, start + 48, np.array([-x, 0, 0, 0, y, 0, 0, 0, 1 << 30], ">i4").tobytes())
    assert seen(decode_video(mirrored, EVERY, 32).frames[-1]) == ("green", "red", "grey", "blue")
    nothing = patch(clip, start + 48, np.zeros(9, ">i4").tobytes())
    assert seen(decode_video(nothing, EVERY, 32).frames[-1]) == UPRIGHT


#: Ways to store colours, the encoder's name and its pixels, and what is set besides.
PIXELS = [
    ("libx264", "yuv420p", {}),
    ("libx264", "yuv444p", {}),
    ("libx264", "yuv420p10le", {}),
    ("libx264", "yuv420p", {"colorspace": 1, "color_range": 1}),
    ("libx264", "yuv420p", {"colorspace": 1, "color_range": 2}),
    ("libx264", "yuv420p", {"colorspace": 9}),
    ("mjpeg", "yuvj420p", {}),
    ("ffv1", "bgra", {}),
    ("ffv1", "yuva420p", {}),
    ("ffv1", "gray16le", {}),
    ("ffv1", "gray", {}),
    ("libx264rgb", "rgb24", {}),
]


@pytest.mark.parametrize(("codec", "pix_fmt", "colour"), PIXELS)
@pytest.mark.parametrize("size", [(48, 64), (90, 162), (37, 53)])
def test_frames_given_as_arrays_are_the_pixels_of_the_file(
    codec: str, pix_fmt: str, colour: dict[str, int], size: tuple[int, int]
) -> None:
    if codec == "libx264" and "444" not in pix_fmt and size[0] % 2:
        size = (size[0] + 1, size[1] + 1)
    noise = np.random.default_rng(0).integers(0, 256, (3, *size, 3)).astype(np.uint8)

    def prepare(stream: av.VideoStream) -> None:
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)

    clip = encode("matroska", codec, noise, pix_fmt=pix_fmt, prepare=prepare)
    with av.open(io.BytesIO(clip)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for side in (16, 48, 100):
        of_file = decode_video(clip, EVERY, side)
        of_arrays = sample_frames(frames, of_file.seconds, EVERY, side)
        assert torch.equal(of_file.frames, of_arrays.frames)


def test_pictures_are_scaled_as_pillow_scales_them() -> None:
    rng = np.random.default_rng(1)
    for height, width in ((64, 64), (33, 70), (1, 1), (1, 200), (5, 400)):
        picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        for side in (1, 16, 64):
            square = to_square(picture, side)
            expected = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
            assert square.dtype == torch.uint8
            # Both round sums of the same integer weights; halves may fall apart.
            assert (square.permute(1, 2, 0).int() - torch.from_numpy(expected.astype(np.int32))).abs().max() <= 2
    assert torch.equal(to_square(picture[::-1], 400), to_square(np.ascontiguousarray(picture[::-1]), 400))


def images() -> dict[str, tuple[Image.Image, str, dict]]:
    """Images of every mode, the format that keeps it, and how it is saved."""
    rng = np.random.default_rng(2)
    colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize((56, 40))
    alpha = Image.fromarray(rng.integers(0, 256, (40, 56)).astype(np.uint8))
    deep = Image.fromarray(rng.integers(0, 2**16, (40, 56)).astype(np.uint16))
    clear, grey_clear, palette = colours.convert("RGBA"), colours.convert("LA"), colours.quantize(60)
    clear.putalpha(alpha)
    grey_clear.putalpha(alpha)
    return {
        "jpeg": (colours, "JPEG", {}),
        "grey": (colours.convert("L"), "PNG", {}),
        "16-bit grey": (deep, "PNG", {}),
        "16-bit grey tiff": (deep, "TIFF", {}),
        "palette": (palette, "PNG", {}),
        "palette with a clear colour": (palette, "PNG", {"transparency": 3}),
        "palette with clear colours": (palette, "PNG", {"transparency": bytes(range(60))}),
        "rgb with a clear colour": (colours, "PNG", {"transparency": (1, 2, 3)}),
        "transparent": (clear, "PNG", {}),
        "transparent webp": (clear, "WEBP", {"lossless": True, "exact": True}),
        "transparent grey": (grey_clear, "PNG", {}),
        "gif": (palette, "GIF", {"transparency": 0}),
        "bits": (colours.convert("1"), "PNG", {}),
        "print colours": (colours.convert("CMYK"), "JPEG", {}),
        "bmp": (colours, "BMP", {}),
    }


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize(
    ("kind", "orientation"),
    # GIF and BMP have no EXIF.
    [(kind, o) for kind, image in images().items() for o in (1, 3, 5, 6) if o == 1 or image[1] not in ("GIF", "BMP")],
)
def test_an_image_is_the_same_by_path_by_bytes_and_as_an_object(kind: str, orientation: int, tmp_path: Path) -> None:
    image, image_format, settings = images()[kind]
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings = {**settings, "exif": exif}
    path = tmp_path / "image.any"
    image.save(path, image_format, **settings)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == ((40, 56, 3) if orientation < 5 else (56, 40, 3))
    assert np.array_equal(read_image(str(path)), pixels)
    assert np.array_equal(read_image(path.read_bytes()), pixels)
    # Not by its path: Pillow 13 maps files of 16 bits into memory with rows and columns mixed up.
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        assert np.array_equal(read_image(opened), pixels)
        if "16-bit" not in kind:
            # Somebody who makes it RGB and upright first gets the same.
            upright = ImageOps.exif_transpose(opened)
            assert np.array_equal(read_image(upright.convert("RGB")), pixels)
            assert np.array_equal(np.asarray(upright.convert("RGB")), pixels)


def test_sixteen_bits_become_the_upper_eight() -> None:
    levels = np.array([[0, 255, 256, 0x1234, 0x80FF, 0xFFFF]], np.uint16)
    assert read_image(Image.fromarray(levels))[0, :, 1].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"pixels of 32 bits .mode {mode}.*convert it to 8 bits"):
            read_image(Image.new(mode, (4, 4)))
