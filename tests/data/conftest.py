"""Clips with known frames, the demo's tokenizer, and tiny data sets, all made here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from transformers import AutoTokenizer

from hybridprune_megatron.config import Config, parse_command_line
from scripts.make_demo_data import main as make_demo_data

ROOT = Path(__file__).resolve().parents[2]


def encode_clip(
    frames: np.ndarray, times_ms: Sequence[int], codec: str = "libx264", gop: int = 4, file_format: str = "mp4"
) -> bytes:
    """uint8 [F, H, W, 3] frames shown at given times in milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=file_format) as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "5"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(frames, times_ms):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def grey_frames(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame i has the grey level ``20 + 200 * i / (count - 1)``, so that a decoded frame tells its index."""
    levels = np.linspace(20, 220, count)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def frame_indices(frames: Any, count: int) -> list[int]:
    """Which frames of ``grey_frames(count)`` these are."""
    levels = frames.float().mean(dim=(1, 2, 3))
    return [round((float(level) - 20) / 200 * (count - 1)) for level in levels]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "assets/demo/tokenizer", local_files_only=True)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data sets train (13 samples) and validation (5 samples)."""
    out = tmp_path_factory.mktemp("demo")
    make_demo_data(f"--out {out} --train 13 --validation 5 --frames 8 --fps 1 --workers 1 --seed 3".split())
    return out


@pytest.fixture(scope="session")
def demo_config(demo_data: Path) -> Callable[..., Config]:
    """Builds the demo's configuration over the tiny data sets."""

    def build(*overrides: str) -> Config:
        tiny = ["data.num_frames=4", "data.sequence_length=320", "data.packing_buffer=4", "data.shuffle_buffer=6"]
        # One stream of data; what happens with several is in test_streams.py.
        tiny += ["trainer.global_batch_size=1"]
        paths = [f"data.train={demo_data / 'train'}", f"data.validation={demo_data / 'validation'}"]
        # A name of its own: runs/demo_base may hold a run.
        return parse_command_line(
            [
                "experiment=demo_base",
                "name=tests",
                f"data.tokenizer={ROOT / 'assets/demo/tokenizer'}",
                *paths,
                *tiny,
                *overrides,
            ]
        )

    return build
