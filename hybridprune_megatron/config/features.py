"""Data sets that hold features of a vision tower instead of videos: what they say about themselves, and what fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.json_text import parse_json, short
from hybridprune_megatron.config.stores import AnyPath

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config, ModelConfig

#: Lies beside the shards of such a data set; every features part carries the same in its header.
FEATURES_FILE = "features.json"
_REMEDY = "precompute features with this configuration (hybridprune features), or read the videos"


@dataclass(frozen=True)
class FeaturesInfo:
    """Where features come from.

    Attributes:
        tower: fingerprint of the tower's weights (``tower_fingerprint``).
        frame_size: side of the frames that the tower saw, pixels.
        tokens_per_frame: tokens of a frame after the pixel shuffle.
        channels: width of a token before the projector.
        sampling: overrides of ``data`` that chose the stored frames.
        dtype: what features are stored in, bf16 or fp32.
    """

    tower: str
    frame_size: int
    tokens_per_frame: int
    channels: int
    sampling: str
    dtype: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_json(text: str) -> FeaturesInfo:
        """The reverse of ``to_json``; keys it does not know are ignored.

        Raises:
            ValueError: no JSON object, or a field is missing.
        """
        content = parse_json(text)
        names = [field.name for field in fields(FeaturesInfo)]
        if not isinstance(content, dict) or not set(names) <= set(content):
            raise ValueError(f"expected an object with {', '.join(names)}")
        for field in fields(FeaturesInfo):
            value = content[field.name]
            # Annotations are text here.
            if type(value).__name__ != field.type or (isinstance(value, str) and not value.isprintable()):
                raise ValueError(f"{field.name} is {short(value)}: expected {field.type}")
        return FeaturesInfo(**{name: content[name] for name in names})

    def check(self, model: ModelConfig, where: str) -> None:
        """Refuses a model that these features are not for. The tower's weights are compared by the model itself.

        Args:
            model: the configuration of the model that they are given to.
            where: what to call them in an error.

        Raises:
            ConfigError: they do not fit.
        """
        vision = model.vision
        if vision is None:
            raise ConfigError(f"{where}: features for model.vision=null; choose a model with vision or text-only data")
        if model.trainable.vision:
            reason = f"{where} holds features of a frozen tower"
            raise fail("model.trainable.vision", "true", reason, "set model.trainable.vision=false, or train on videos")
        for key, stored, configured in (
            ("model.vision.frame_size", self.frame_size, vision.frame_size),
            ("tokens per frame", self.tokens_per_frame, vision.tokens_per_frame),
            ("model.vision.hidden_size/pixel_shuffle^2", self.channels, vision.projector_input_size),
        ):
            if stored != configured:
                raise ConfigError(f"{where}: features with {key}={stored}, configured is {configured}; {_REMEDY}")


def check_folder(cfg: Config, where: str, folder: AnyPath) -> FeaturesInfo | None:
    """What a data set says about its features, None if it holds none; they are for the configured model.

    Args:
        where: what to call the data set in an error.

    Raises:
        ConfigError: they are not, or cannot be told.
    """
    info = read_info(folder, where)
    if info is None:
        return None
    info.check(cfg.model, where)
    if cfg.reduction.front.needs_pixels:
        reason = f"compares frames, and {where} holds features of them"
        raise fail("reduction.front", cfg.reduction.front.name, reason, "set reduction.front=evs, or read the videos")
    return info


def read_info(folder: AnyPath, where: str) -> FeaturesInfo | None:
    """What a data set says about its features, None if it holds none.

    Raises:
        ConfigError: its description cannot be read.
    """
    file = folder / FEATURES_FILE
    if not file.is_file():
        return None
    try:
        return FeaturesInfo.from_json(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: its {FEATURES_FILE} cannot be read ({error}); {_REMEDY}") from error
