"""Pictures as uint8 RGB, upright, and scaled to the square that the vision tower takes.

A picture is the same whichever way it came: colours become RGB and it is turned upright at full size, then it is
scaled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridprune_megatron.data.media import MIN_SIDE, MediaError, check_image_size, open_image

_ORIENTATION_TAG = 0x0112
#: EXIF orientations: whether rows and columns change places, then whether columns and rows are reversed.
_ORIENTATIONS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def read_image(source: Any, name: str = "image") -> np.ndarray:
    """A picture as a viewer shows it, without transparency; of an animation the first.

    Args:
        source: the bytes of an image file, its path, or a PIL image: of any mode that Pillow turns into RGB, or of
            16-bit grey, of which the upper 8 bits are taken.
        name: what to call it in an error, if it has no path.

    Returns:
        uint8 [H, W, 3], RGB, turned by the EXIF orientation.

    Raises:
        ValueError: it cannot be read.
    """
    with _one_line(source, name):
        if hasattr(source, "getexif"):
            return _pixels(source)
        with open_image(source) as image:
            return _pixels(image)


@contextmanager
def _one_line(source: Any, name: str) -> Iterator[None]:
    """Makes one line of whatever Pillow has to say."""
    if isinstance(source, str | Path):
        name = " ".join(str(source).split())
    try:
        yield
    except MediaError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    except Exception as error:
        # Pillow's readers raise whatever a broken file makes of them: OSError, SyntaxError, struct.error, KeyError.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} cannot be read ({reason:.200}): give an image file") from error


def turned(pixels: np.ndarray, swap: bool, reverse_columns: bool, reverse_rows: bool) -> np.ndarray:
    """Mirrors and turns a picture: all eight ways to lay it down.

    Args:
        pixels: [H, W, 3].
        swap: whether rows and columns change places first.
        reverse_columns: whether left and right change places then.
        reverse_rows: whether top and bottom do.
    """
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]


def to_square(pixels: np.ndarray, side: int) -> Tensor:
    """Scales a picture, its aspect ratio given up: bicubic, which low-passes when it shrinks.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        side: of the square, in pixels.

    Returns:
        uint8 [3, side, side].
    """
    return _scaled(pixels, side, side)


def _scaled(pixels: np.ndarray, height: int, width: int) -> Tensor:
    picture = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)
    if picture.shape[1:] != (height, width):
        picture = torch.nn.functional.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    return picture.contiguous()


def image_size(source: Any, name: str = "image") -> tuple[int, int]:
    """Width and height of a picture as ``read_image`` returns it, without decoding it.

    Args:
        source: the bytes of an image file, or its path.
        name: what to call it in an error, if it has no path.

    Raises:
        ValueError: it cannot be read.
    """
    with _one_line(source, name), open_image(source) as image:
        swapped = _ORIENTATIONS.get(_orientation(image), (False, False, False))[0]
        width, height = image.size
        return (height, width) if swapped else (width, height)


def tile_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiles that a picture is cut into: those that keep most of its area and its aspect ratio.

    The rule of Eagle 2.5 (arXiv 2504.15271): of all grids of at most ``most`` tiles the highest
    ``min(tiles' area / picture's area, 0.6) x min(aspect of one / aspect of the other)``; of equal ones the smallest.
    Other than there, no grid is larger than the picture, to the next tile: enlarging shows nothing more.

    Args:
        width, height: of the picture, in pixels.
        side: of a tile, in pixels.
        most: tiles.
    """
    most = min(most, math.ceil(width * height / side**2))
    grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]

    def worth(grid: tuple[int, int]) -> float:
        columns, rows = grid
        stretch = columns * height / (rows * width)
        return min(columns * rows * side**2 / (width * height), 0.6) * min(stretch, 1 / stretch)

    return max(sorted(grids, key=lambda grid: grid[0] * grid[1]), key=worth)


def num_tiles(grid: tuple[int, int]) -> int:
    """Tiles of a picture with its thumbnail, which it has if there are several."""
    columns, rows = grid
    return columns * rows + (columns * rows > 1)


def to_tiles(pixels: np.ndarray, side: int, most: int) -> Tensor:
    """Cuts a picture into square tiles (``tile_grid``), row by row, with the whole of it as a thumbnail after several.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        side: of a tile, in pixels.
        most: tiles.

    Returns:
        uint8 [T, 3, side, side].

    Raises:
        ValueError: the picture is smaller than pictures that are read.
    """
    height, width = pixels.shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels; at least {MIN_SIDE} on a side are read: scale it up")
    columns, rows = tile_grid(width, height, side, most)
    scaled = _scaled(pixels, rows * side, columns * side)
    tiles = scaled.unflatten(1, (rows, side)).unflatten(3, (columns, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([tiles, to_square(pixels, side)[None]]) if len(tiles) > 1 else tiles


def _pixels(image: Any) -> np.ndarray:
    check_image_size(*image.size)
    # Before the orientation is read: some readers turn the picture while they load it.
    image.load()
    turn = _ORIENTATIONS.get(_orientation(image), (False, False, False))
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return turned(np.repeat(grey[:, :, None], 3, axis=2), *turn)
    if image.mode in ("I", "F"):
        raise MediaError(f"pixels of 32 bits (mode {image.mode}), whose range is not known: convert it to 8 bits")
    return turned(np.array(image.convert("RGB")), *turn)


def _orientation(image: Any) -> int:
    try:
        with warnings.catch_warnings(action="ignore"):
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # Broken EXIF says nothing; viewers show the picture as it is.
        return 1
