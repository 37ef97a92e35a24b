"""A data set of noise in which two frames of every clip are of one colour, and the tiny model that reads it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.shards import ShardWriter
from studies.needles.needles import encode_clip
from tests.models.tiny import tiny_config

FRAMES = 8
COLOURS = {"red": (250, 10, 10), "blue": (10, 10, 250)}


def write_clips(folder: Path, count: int, needles: bool = True) -> Path:
    """Clips of 8 frames, two of them red or blue, half of each."""
    rng = np.random.default_rng(7)
    with ShardWriter(folder, "val") as writer:
        for index in range(count):
            colour = list(COLOURS)[index % 2]
            first = int(rng.integers(FRAMES - 1))
            frames = rng.integers(80, 176, (FRAMES, 64, 64, 3), dtype=np.uint8)
            frames[first : first + 2] = COLOURS[colour]
            messages = [
                {"role": "user", "content": "<video>\nWhat colour is the needle?"},
                {"role": "assistant", "content": colour},
            ]
            meta = {"kind": "colour", "answer": colour, "choices": list(COLOURS)}
            if needles:
                meta |= {"evidence_frames": [[first, first + 2]]}
                meta |= {"needles": [{"colour": colour, "first_frame": first, "num_frames": 2}]}
            video = encode_clip(frames, Fraction(2))
            writer.add(f"clip-{index:03d}", messages, [("mp4", video)], meta)
    return folder


def clip_config(*overrides: str) -> Config:
    """The tiny model with words enough for the demo's tokenizer."""
    return tiny_config("model.vocab_size=1024", f"data.num_frames={FRAMES}", *overrides)
