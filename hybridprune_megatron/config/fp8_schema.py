"""The fp8 group: which linears run in FP8 and how, and what that asks of the other groups.

Imports nothing slow: a width that does not divide is reported before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hybridprune_megatron.bounds import OneOf, Size, Whole, check_bounds
from hybridprune_megatron.checks import fail
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.schedule import layer_symbols

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

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
            raise fail(
                "fp8.first_last_layers_bf16",
                True,
                "fp8.recipe=delayed updates the scales of all layers when the last one is done, so none can be left "
                "out",
                "set fp8=delayed (all layers in FP8), or fp8=tensorwise",
            )

    @property
    def tile(self) -> int:
        """What rows and columns of every matrix divide by; 1 without FP8."""
        return TILE[self.recipe] if self.recipe is not None else 1

    def quantizes(self, layer: int, num_layers: int) -> bool:
        """Whether the linears of a layer run in FP8.

        Args:
            layer: 0-based, of the whole model.
            num_layers: of the whole model.
        """
        if self.recipe is None or not self.first_last_layers_bf16:
            return self.recipe is not None
        return self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16


def check_fp8(cfg: Config) -> None:
    """FP8 has layers to run in, the kernels for it, and widths that divide; raises ``ConfigError`` at the first."""
    fp8 = cfg.fp8
    if fp8.recipe is None:
        return
    if cfg.trainer.precision != "bf16":
        reason = f"fp8.recipe={fp8.recipe} keeps weights and everything but the linears' products in bf16"
        raise fail("trainer.precision", cfg.trainer.precision, reason, "set trainer.precision=bf16 or fp8=none")
    if cfg.model.spec == "torch":
        reason = f"plain torch has no FP8, and fp8.recipe={fp8.recipe}"
        raise fail("model.spec", "torch", reason, "set model.spec=te or fp8=none")
    _check_layers(cfg)
    _check_widths(cfg)


def _check_layers(cfg: Config) -> None:
    fp8, layers = cfg.fp8, cfg.model.num_layers
    if not fp8.first_last_layers_bf16:
        return
    # Megatron's own bound.
    most = layers // cfg.parallel.pipeline
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(fp8, name)
        if count > most:
            reason = f"must not exceed the {most} layers of a pipeline stage"
            raise fail(f"fp8.{name}", count, reason, f"lower fp8.{name}")
    if not any(fp8.quantizes(layer, layers) for layer in range(layers)):
        raise fail(
            "fp8.num_layers_at_start_in_bf16",
            fp8.num_layers_at_start_in_bf16,
            f"leaves none of the {layers} layers to FP8 with "
            f"fp8.num_layers_at_end_in_bf16={fp8.num_layers_at_end_in_bf16}",
            "lower either, or set fp8=none",
        )


def _check_widths(cfg: Config) -> None:
    """Both sides of every linear in FP8, as a tensor-parallel rank holds it, divide by the tile."""
    tile, tensor = cfg.fp8.tile, cfg.parallel.tensor
    for key, width, split in _widths(cfg):
        own = width // tensor if split else width
        if own % tile:
            shared = split and tensor > 1
            share = f"{width} / parallel.tensor={tensor} = {own}" if shared else f"{own}"
            other = "fp8=tensorwise (16)" if tile > TILE["tensorwise"] else "fp8=none"
            fix = f"set {other}" + (" or lower parallel.tensor" if shared else "")
            raise fail(key, share, f"must be a multiple of {tile} for fp8.recipe={cfg.fp8.recipe}", fix)


def _widths(cfg: Config) -> list[tuple[str, int, bool]]:
    """Name, size, and whether tensor parallelism splits it: inputs and outputs of the linears in FP8."""
    model = cfg.model
    symbols = layer_symbols(model.hybrid_pattern)
    present = {symbol for index, symbol in enumerate(symbols) if cfg.fp8.quantizes(index, len(symbols))}
    found = [("model.hidden_size", model.hidden_size, False)]
    for symbol, kind in KINDS.items():
        found += kind.fp8_widths(model) if symbol in present else []
    return found
