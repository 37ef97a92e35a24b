"""Features of frames in the place of a video: one part of a stored sample, read without copying.

The part is a safetensors file: ``features`` [F, M, C]; ``video_seconds`` float64 [N], the times of all frames of the
video; ``frame_indices`` int64 [F], which of them are stored. All N times are kept so that a sampling chooses from
features exactly what it would choose from the video.

Shape letters: N frames of the video, F frames stored or taken, M tokens a frame, C channels a token.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.features import FeaturesInfo
from hybridprune_megatron.config.json_text import parse_json, short
from hybridprune_megatron.data.batch import FrameFeatures
from hybridprune_megatron.data.video import FrameSampling

FEATURES_EXTENSION = "safetensors"
#: What a features part holds: the dtypes of each tensor, by the names of the safetensors format, and its dimensions.
_TENSORS: dict[str, tuple[dict[str, torch.dtype], int]] = {
    "features": ({"BF16": torch.bfloat16, "F32": torch.float32}, 3),
    "video_seconds": ({"F64": torch.float64}, 1),
    "frame_indices": ({"I64": torch.int64}, 1),
}
_MOST_HEADER_BYTES = 2**20


def features_part(
    features: Tensor, video_seconds: Sequence[float], frame_indices: Sequence[int], info: FeaturesInfo
) -> bytes:
    """The bytes of a features part.

    Args:
        features: bf16 or float32 [F, M, C].
        video_seconds: N times of all frames of the video.
        frame_indices: F indices into them, rising.
        info: where the features come from.
    """
    assert len(features) == len(frame_indices), (features.shape, len(frame_indices))
    tensors = {
        "features": features.contiguous(),
        "video_seconds": torch.tensor(video_seconds, dtype=torch.float64),
        "frame_indices": torch.tensor(frame_indices, dtype=torch.int64),
    }
    return save(tensors, metadata={"info": info.to_json()})


@dataclass(frozen=True)
class StoredFeatures:
    """A features part as it lies in its shard.

    Attributes:
        data: its bytes. Tensors are views of them.
    """

    data: bytes

    @cached_property
    def info(self) -> FeaturesInfo:
        """Where the features come from.

        Raises:
            ValueError: this is not a features part.
        """
        return FeaturesInfo.from_json(self._header["__metadata__"]["info"])

    def seconds(self, sampling: FrameSampling) -> list[float]:
        """Times of the frames that a sampling takes.

        Raises:
            ConfigError: it takes frames that are not stored.
            ValueError: this is not a features part.
        """
        return self._chosen(sampling)[1]

    @property
    def video_seconds(self) -> list[float]:
        """Times of all frames of the video, stored or not."""
        return self._frames[0]

    def read(self, sampling: FrameSampling) -> tuple[FrameFeatures, list[float]]:
        """Features and times of the frames that a sampling takes; a view of the stored bytes if it takes all.

        Raises:
            ConfigError: it takes frames that are not stored.
            ValueError: this is not a features part.
        """
        rows, seconds = self._chosen(sampling)
        values = self._tensor("features")
        if len(rows) < len(values):
            values = values.index_select(0, torch.tensor(rows))
        return FrameFeatures(values, self.info.tower), seconds

    def _chosen(self, sampling: FrameSampling) -> tuple[list[int], list[float]]:
        """Rows of ``features`` and times of the frames that a sampling takes."""
        times, indices = self._frames
        row_of = {frame: row for row, frame in enumerate(indices)}
        wanted = sampling.choose(times)
        missing = [frame for frame in wanted if frame not in row_of]
        if missing:
            raise ConfigError(
                f"{len(missing)} of the {len(wanted)} frames that {sampling.overrides} takes, the first at "
                f"{times[missing[0]]:.2f} s, are not among the {len(row_of)} of {len(times)} stored by "
                f"{self.info.sampling}; set data so, or precompute features with this sampling"
            )
        return [row_of[frame] for frame in wanted], [times[frame] for frame in wanted]

    @cached_property
    def _frames(self) -> tuple[list[float], list[int]]:
        """Times of all frames of the video, and which of them are stored."""
        times, indices = self._tensor("video_seconds").tolist(), self._tensor("frame_indices").tolist()
        rising = all(a < b for a, b in pairwise(times)) and all(a < b for a, b in pairwise(indices))
        if (
            not rising
            or times[0] != 0
            or not math.isfinite(times[-1])
            or not 0 <= indices[0] <= indices[-1] < len(times)
        ):
            raise ValueError("a features part whose times or frames do not rise from 0 to the end of the video")
        if len(indices) != len(self._tensor("features")):
            raise ValueError(f"a features part without features of its {len(indices)} frames")
        return times, indices

    @cached_property
    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self.data[:8], "little")
        try:
            if length > min(len(self.data) - 8, _MOST_HEADER_BYTES):
                raise ValueError(f"of {length} bytes in {len(self.data)}")
            header = parse_json(self.data[8 : 8 + length])
        except ValueError as error:
            raise ValueError(f"a features part without a header ({error})") from error
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("info"), str):
            raise ValueError('a features part whose header has no "info"')
        return header

    def _tensor(self, name: str) -> Tensor:
        dtypes, dimensions = _TENSORS[name]
        first = 8 + int.from_bytes(self.data[:8], "little")
        try:
            entry = self._header[name]
            (start, end), dtype, shape = entry["data_offsets"], dtypes[entry["dtype"]], entry["shape"]
            count = math.prod(shape)
            counted = all(type(number) is int and number >= 0 for number in (start, end, *shape))
            if not counted or len(shape) != dimensions or count < 1 or count * dtype.itemsize != end - start:
                raise ValueError(f"shape {short(shape)} in bytes {short([start, end])}")
            with warnings.catch_warnings():
                # Bytes cannot be written to. Nobody writes to features: they are sliced, moved or projected.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                return torch.frombuffer(self.data, dtype=dtype, count=count, offset=first + start).view(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a features part without {name} ({error!r})") from error
