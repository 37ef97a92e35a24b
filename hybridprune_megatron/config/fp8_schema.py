"""The fp8 group: which linears run in FP8 and how.

Imports nothing slow: a width that does not divide is reported before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridprune_megatron.bounds import OneOf, Size, Whole, check_bounds
from hybridprune_megatron.checks import fail

#: What rows and columns of every matrix in FP8 divide by: matrix products take 16 numbers at a time, a scale of mxfp8
#: is that of 32 and one of blockwise that of 128. (How many rows an expert gets is megatron's matter.)
TILE = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}


@dataclass
class Fp8Config:
    """FP8 in the linears of the language model's layers (Transformer Engine). Names as in megatron's configuration.

    Attributes:
        recipe: how tensors are scaled; tensorwise, delayed, blockwise or mxfp8; null = no FP8.
        format: hybrid (gradients in e5m2, the rest in e4m3) or e4m3 (all).
        first_last_layers_bf16: the first and last layers stay in bf16; not with delayed, which scales all at once.
        num_layers_at_start_in_bf16: how many layers these are at the start.
        num_layers_at_end_in_bf16: how many layers these are at the end.
        amax_history_len: passes that delayed looks back for the largest value.
        amax_compute_algo: what delayed scales by; max (of these passes) or most_recent.
    """

    recipe: Annotated[str, OneOf(*TILE)] | None = None
    format: Annotated[str, OneOf("hybrid", "e4m3")] = "hybrid"
    first_last_layers_bf16: bool = True
    num_layers_at_start_in_bf16: Whole = 1
    num_layers_at_end_in_bf16: Whole = 1
    amax_history_len: Size = 1024
    amax_compute_algo: Annotated[str, OneOf("max", "most_recent")] = "max"

    def __post_init__(self) -> None:
        check_bounds("fp8", self)
        if self.recipe == "delayed" and self.first_last_layers_bf16:
            reason = (
                "fp8.recipe=delayed updates the scales of all layers when the last one is done, so none can be left out"
            )
            fix = "set fp8=delayed (all layers in FP8), or fp8=tensorwise"
            raise fail("fp8.first_last_layers_bf16", True, reason, fix)

    @property
    def tile(self) -> int:
        """What rows and columns of every matrix divide by; 1 without FP8."""
        return TILE[self.recipe] if self.recipe is not None else 1

    def quantizes(self, layer: int, num_layers: int) -> bool:
        """Whether the linears of a layer run in FP8.

        Args:
            layer: 0-based, of the whole model.
        """
        if self.recipe is None or not self.first_last_layers_bf16:
            return self.recipe is not None
        return self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16
