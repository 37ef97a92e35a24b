"""The ``target.*`` keys of ``hybridprune plan``: what is to be reached, and for which video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from hybridprune_megatron.bounds import FLOAT_MAX, Count, OneOf, Range, Whole, check_bounds, read_value
from hybridprune_megatron.checks import closest, fail
from hybridprune_megatron.layers.operations import Cost


@dataclass(frozen=True)
class Device:
    """Peaks of one GPU, as its maker publishes them (dense, SXM).

    Attributes:
        flops: operations a second by precision; fp32 without tensor cores, as torch multiplies it by default.
        bytes: bytes a second between memory and chip.
    """

    flops: dict[str, float]
    bytes: float

    def seconds(self, operations: Iterable[Cost], precision: str) -> float:
        """A lower bound: each operation takes as long as its products or its bytes, whichever takes longer."""
        return sum(max(cost.flops / self.flops[precision], cost.bytes / self.bytes) for cost in operations)


DEVICES = {
    "a100": Device({"bf16": 312e12, "fp32": 19.5e12}, 2.039e12),
    "h100": Device({"bf16": 989e12, "fp32": 67e12}, 3.35e12),
    "h200": Device({"bf16": 989e12, "fp32": 67e12}, 4.8e12),
}

# As CUDA names those whose peaks these are. Other forms of a chip (PCIe, NVL, a part of one) have other peaks.
_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def device_named(name: str) -> Device | None:
    """The device that CUDA calls by a name; None: its peaks are not known.

    Args:
        name: as ``torch.cuda.get_device_name`` gives it.
    """
    known = _NAMES.get(name)
    return None if known is None else DEVICES[known]


PREFIX = "target."
# Text around one frame in the published model's prompt: 2,202 tokens for 8 frames of 256, 26 of them for the rest.
FRAME_TEXT_TOKENS = 16


@dataclass
class TargetConfig:
    """What a plan is to reach, and the video that it is counted for.

    Attributes:
        speedup: prefill operations without reduction over those with it, above 1; null = no such target.
        memory_gib: peak memory of one rank, GiB; null = no such target.
        parts: what speedup counts; language (the language model), or all (vision tower and projector too).
        memory_of: what memory_gib bounds; training (one step on packed sequences), or prefill (one sample).
        frames: frames of the video; null = the most that data.* lets a video have.
        visual_tokens: visual tokens instead of frames; leaves tower and projector out.
        text_tokens: tokens of the prompt that are neither frames nor text between frames.
        frame_text_tokens: text around one frame (data.frame_text with <img> and </img>); needs frames.
        question_tokens: tokens of the question, among the text tokens; they score.
        answer_tokens: tokens with a loss per sample in training, among the text tokens.
        device: roofline for predicted times; a100, h100 or h200.
    """

    speedup: Annotated[float, Range(1, FLOAT_MAX, above=True, example=4)] | None = None
    memory_gib: Annotated[float, Range(0, FLOAT_MAX, above=True, example=80)] | None = None
    parts: Annotated[str, OneOf("language", "all")] = "language"
    memory_of: Annotated[str, OneOf("training", "prefill")] = "training"
    frames: Count | None = None
    visual_tokens: Count | None = None
    text_tokens: Count = 200
    frame_text_tokens: Whole = FRAME_TEXT_TOKENS
    question_tokens: Count = 30
    answer_tokens: Count = 30
    device: Annotated[str, OneOf(*DEVICES)] = "h100"

    def __post_init__(self) -> None:
        check_bounds(PREFIX.rstrip("."), self)
        if self.frames is not None and self.visual_tokens is not None:
            raise fail("target.visual_tokens", self.visual_tokens, "target.frames is set too", "set one of the two")
        if self.parts == "all" and self.visual_tokens is not None:
            raise fail("target.parts", "all", "the tower works on frames", "set target.frames, not visual_tokens")
        for name in ("question_tokens", "answer_tokens"):
            if getattr(self, name) > self.text_tokens:
                key = f"target.{name}"
                allowed = f"must not exceed target.text_tokens={self.text_tokens}, which they are a part of"
                raise fail(key, getattr(self, name), allowed, f"lower {key} or raise target.text_tokens")


def split_target(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that set ``target.*`` keys, and the others."""
    mine = [argument for argument in arguments if argument.startswith(PREFIX)]
    return mine, [argument for argument in arguments if not argument.startswith(PREFIX)]


def read_target(overrides: Sequence[str]) -> TargetConfig:
    """The typed target of some overrides, e.g. ["target.speedup=4"].

    Raises:
        ConfigError: one line on the first that is wrong.
    """
    known = [each.name for each in fields(TargetConfig)]
    values = {}
    for override in overrides:
        key, _, text = override.partition("=")
        name = key.removeprefix(PREFIX)
        if name not in known:
            near = closest(name, known)
            fix = f"did you mean {PREFIX}{near}?" if near else "hybridprune plan --help shows them"
            raise fail(key, text, f"unknown key; target has {', '.join(known)}", fix)
        values[name] = read_value(key, text, TargetConfig, name)
    return TargetConfig(**values)
