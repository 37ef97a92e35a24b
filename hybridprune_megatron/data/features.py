"""Features of frames in the place of a video: one part of a stored sample, read without copying.

The part is a safetensors file: ``features`` [F, M, C]; ``video_seconds`` float64 [N], the times of all frames of the
video; ``frame_indices`` int64 [F], which of them are stored. All N times are kept so that a sampling chooses from
features exactly what it would choose from the video.

Shape letters: N frames of the video, F frames stored or taken, M tokens a frame, C channels a token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.features import FeaturesInfo
from hybridprune_megatron.data.batch import FrameFeatures
from hybridprune_megatron.data.video import FrameSampling

FEATURES_EXTENSION = "safetensors"
#: What a features part may hold, by the names of the safetensors format.
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


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
            ValueError: this is no features part.
        """
        return FeaturesInfo.from_json(str(self._header["__metadata__"]["info"]))

    def seconds(self, sampling: FrameSampling) -> list[float]:
        """Times of the frames that a sampling takes.

        Raises:
            ConfigError: it takes frames that are not stored.
            ValueError: this is no features part.
        """
        return self._chosen(sampling)[1]

    def read(self, sampling: FrameSampling) -> tuple[FrameFeatures, list[float]]:
        """Features and times of the frames that a sampling takes; a view of the stored bytes if it takes all.

        Raises:
            ConfigError: it takes frames that are not stored.
            ValueError: this is no features part.
        """
        rows, seconds = self._chosen(sampling)
        values = self._tensor("features")
        if len(rows) < len(values):
            values = values.index_select(0, torch.tensor(rows))
        return FrameFeatures(values, self.info.tower), seconds

    def _chosen(self, sampling: FrameSampling) -> tuple[list[int], list[float]]:
        """Rows of ``features`` and times of the frames that a sampling takes."""
        times = self._tensor("video_seconds").tolist()
        row_of = {frame: row for row, frame in enumerate(self._tensor("frame_indices").tolist())}
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
    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self.data[:8], "little")
        try:
            header = json.loads(self.data[8 : 8 + length])
        except ValueError as error:
            raise ValueError(f"a features part without a header ({error})") from error
        if not isinstance(header, dict) or "info" not in header.get("__metadata__", {}):
            raise ValueError('a features part whose header has no "info"')
        return header

    def _tensor(self, name: str) -> Tensor:
        try:
            entry = self._header[name]
            start, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            offset = 8 + int.from_bytes(self.data[:8], "little") + start
            with warnings.catch_warnings():
                # Bytes cannot be written to. Nobody writes to features: they are sliced, moved or projected.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                flat = torch.frombuffer(self.data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=offset)
            return flat.view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"a features part without {name} ({error!r})") from error
