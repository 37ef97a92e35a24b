"""Time from operations and bytes: the roofline of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
