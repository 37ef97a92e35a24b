"""What stands for a placeholder of a conversation: a video file, an image file, or features of a video's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridprune_megatron.data.features import StoredFeatures

#: Of files of images; an animation is a video.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class StoredImage:
    """An image as it was stored.

    Attributes:
        data: bytes of the file.
    """

    data: bytes


#: A video is the bytes of its file.
StoredMedium = bytes | StoredImage | StoredFeatures


def stored(extension: str, data: bytes) -> bytes | StoredImage:
    """A video or an image, whichever files of this type are."""
    return StoredImage(data) if extension in IMAGE_EXTENSIONS else data


def kinds_of(media: Sequence[StoredMedium]) -> list[str]:
    """For each of them, ``image`` or ``video``."""
    return ["image" if isinstance(each, StoredImage) else "video" for each in media]


def kinds_of_names(names: Sequence[str]) -> list[str]:
    """What files of these names are, ``image`` or ``video``."""
    return ["image" if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else "video" for name in names]
