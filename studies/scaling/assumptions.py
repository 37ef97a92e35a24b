"""What the scaling model assumes about the machines and about how well they are used; every number is named here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hybridprune_megatron.bounds import FLOAT_MAX, Range, Rule, check_value
from hybridprune_megatron.config.fields import field_help
from hybridprune_megatron.cost.target import DEVICES, Device

GIGA = 1e9
# Where a value comes from, or why it was chosen; "chosen" has no better source than judgement.
SOURCES = {
    "device": "NVIDIA's H100 SXM data sheet",
    "fp8_flops": "NVIDIA's H100 SXM data sheet, dense",
    "memory_gib": "chosen: of the 80 of the data sheet an H100 offers about so many to a process",
    "usable_memory": "chosen: the CUDA context, NCCL's buffers and the allocator's slack take the rest",
    "linear": "chosen; large bf16 products alone reach about 0.8 of the peak, shards of a model less",
    "attention": "chosen; FlashAttention-3 (arXiv:2407.08608) reports 0.75 at best, causal and backward less",
    "scan": "chosen; the scan's kernels are bound by memory and latency (pytorch.org, Accelerating Mamba2)",
    "fp8_linear": "chosen: casting and scaling take more of the shorter time",
    "bandwidth": "chosen; a copy reaches about 0.9",
    "attention_backward": "five products for two (arXiv:2307.08691)",
    "nvlink": "NVIDIA's H100 SXM data sheet: 900 GB/s both ways",
    "network": "400 Gb/s InfiniBand, one card a GPU, as in DGX H100",
    "wire": "chosen; nccl-tests reach more on idle links with large messages",
    "hop": "chosen: the order of a network's latency",
    "overlap": "chosen: kernels of communication take some of the GPU",
    "frames_over": "as the code divides them",
    "fp8": "fp8=none is the default",
}


@dataclass(frozen=True)
class Assumptions:
    """The machines and how well they are used.

    Attributes:
        device: peaks of the GPU, operations and bytes a second.
        fp8_flops: peak in FP8, operations a second.
        memory_gib: memory of a GPU, GiB.
        usable_memory: share of it that weights, states and activations may fill.
        linear: share of the peak that matrix products reach.
        attention: share of the peak that attention's products reach.
        scan: share of the peak that the scan's products reach.
        fp8_linear: share of the FP8 peak that matrix products reach.
        bandwidth: share of the memory bandwidth that everything else reaches.
        attention_backward: operations of attention's backward over those of its forward; 2 for all else that learns.
        nvlink: bytes a second that a GPU sends to others of its node.
        network: bytes a second that a GPU sends to other nodes.
        wire: share of both that collectives reach.
        hop: seconds of latency a message; a ring of n ranks passes n - 1.
        overlap: share of the products' time in which communication can run beside them, where the code lets it.
        frames_over: ranks that share the frames; context, model (tensor and context), features (precomputed; no tower).
        fp8: linears of the language model run in FP8.
    """

    device: Device = DEVICES["h100"]
    fp8_flops: float = 1979e12
    memory_gib: float = 78.0
    usable_memory: float = 0.9
    linear: float = 0.65
    attention: float = 0.5
    scan: float = 0.1
    fp8_linear: float = 0.5
    bandwidth: float = 0.8
    attention_backward: float = 2.5
    nvlink: float = 450 * GIGA
    network: float = 50 * GIGA
    wire: float = 0.8
    hop: float = 5e-6
    overlap: float = 0.8
    frames_over: str = "model"
    fp8: bool = False

    def __post_init__(self) -> None:
        for name in ("usable_memory", "linear", "attention", "scan", "fp8_linear", "bandwidth", "wire"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: is a share above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap={self.overlap}: is a share from 0 to 1")
        for name in ("fp8_flops", "memory_gib", "attention_backward", "nvlink", "network"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.hop < 0:
            raise ValueError(f"hop={self.hop}: must be 0 seconds or more")
        if self.frames_over not in ("context", "model", "features"):
            raise ValueError(f"frames_over={self.frames_over}: allowed are context, model and features")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, value, meaning and source of every assumption."""
        return [
            (each.name, self._words(each.name), field_help(Assumptions, each.name), SOURCES[each.name])
            for each in fields(self)
        ]

    def _words(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, Device):
            return f"{value.flops['bf16'] / 1e12:g} TFLOP/s bf16, {value.bytes / 1e12:g} TB/s"
        if name.endswith("flops"):
            return f"{value / 1e12:g} TFLOP/s"
        if name in ("nvlink", "network"):
            return f"{value / GIGA:g} GB/s"
        return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value


def changed(assumptions: Assumptions, settings: Sequence[str]) -> Assumptions:
    """Assumptions with some of them set from a command line.

    Args:
        assumptions: all others.
        settings: e.g. ["linear=0.5", "frames_over=model"].

    Raises:
        ValueError: one line on the first that is wrong.
    """
    settable = [each.name for each in fields(Assumptions) if each.name != "device"]
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in settable:
            raise ValueError(f"{setting}: unknown assumption; allowed are {', '.join(settable)}")
        kind = type(getattr(assumptions, name))
        try:
            values[name] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            example = str(getattr(assumptions, name)).lower()
            raise ValueError(f"{setting}: has the wrong type; give e.g. {name}={example}") from error
        if kind in (int, float):
            check_value(name, values[name], Rule(kind, bound=Range(-FLOAT_MAX, FLOAT_MAX)), getattr(assumptions, name))
    return replace(assumptions, **values)
