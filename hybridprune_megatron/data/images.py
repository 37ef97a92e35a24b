"""Pictures as uint8 RGB, upright, and scaled to the square that the vision tower takes.

A picture is the same whichever way it came: colours become RGB and it is turned upright at full size, then it is
scaled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridprune_megatron.data.media import MediaError, check_image_size, open_image

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
    if isinstance(source, str | Path):
        name = " ".join(str(source).split())
    try:
        if hasattr(source, "getexif"):
            return _pixels(source)
        with open_image(source) as image:
            return _pixels(image)
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
    picture = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)
    if picture.shape[1:] != (side, side):
        picture = torch.nn.functional.interpolate(picture[None], (side, side), mode="bicubic", antialias=True)[0]
    return picture.contiguous()


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
