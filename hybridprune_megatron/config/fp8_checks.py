"""What FP8 asks of the other groups: layers to run in, the kernels for it, and widths that divide."""

from __future__ import annotations

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.fp8_schema import TILE
from hybridprune_megatron.config.groups import RunConfig
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.schedule import layer_symbols


def check_fp8(cfg: RunConfig) -> None:
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


def _check_layers(cfg: RunConfig) -> None:
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
        reason = (
            f"leaves none of the {layers} layers to FP8 with "
            f"fp8.num_layers_at_end_in_bf16={fp8.num_layers_at_end_in_bf16}"
        )
        fix = "lower either, or set fp8=none"
        raise fail("fp8.num_layers_at_start_in_bf16", fp8.num_layers_at_start_in_bf16, reason, fix)


def _check_widths(cfg: RunConfig) -> None:
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


def _widths(cfg: RunConfig) -> list[tuple[str, int, bool]]:
    """Name, size, and whether tensor parallelism splits it: inputs and outputs of the linears in FP8."""
    model = cfg.model
    symbols = layer_symbols(model.hybrid_pattern)
    present = {symbol for index, symbol in enumerate(symbols) if cfg.fp8.quantizes(index, len(symbols))}
    found = [("model.hidden_size", model.hidden_size, False)]
    for symbol, kind in KINDS.items():
        found += kind.fp8_widths(model) if symbol in present else []
    return found
