"""Operations and bytes of the vision tower (a RADIO ViT) and of the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridprune_megatron.layers.operations import Cost, elementwise, linear, sum_costs

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import VisionConfig

_CHANNELS = 3


def patches_per_frame(vision: VisionConfig) -> int:
    """Patches of one frame, class and register tokens not counted."""
    return (vision.frame_size // vision.patch_size) ** 2


def tokens_in_tower(vision: VisionConfig) -> int:
    """Tokens of one frame inside the tower: patches, class tokens, register tokens."""
    return patches_per_frame(vision) + vision.num_cls_tokens + vision.num_register_tokens


def tower_operations(vision: VisionConfig, frames: int, width: int) -> dict[str, Cost]:
    """The tower over some frames, by operation, all blocks together.

    Args:
        frames: frames; each attends to itself only.
        width: bytes of an activation or weight.
    """
    hidden, tokens = vision.hidden_size, frames * tokens_in_tower(vision)
    attention = 4 * frames * tokens_in_tower(vision) ** 2 * hidden
    block = {
        "norms": elementwise(4 * tokens * hidden + 4 * hidden, width),
        "qkv": linear(tokens, hidden, 3 * hidden, width),
        "attention": Cost(attention, attention, 4 * tokens * hidden * width),
        "out_proj": linear(tokens, hidden, hidden, width),
        "fc1": linear(tokens, hidden, vision.intermediate_size, width),
        "activation": elementwise(2 * tokens * vision.intermediate_size, width),
        "fc2": linear(tokens, vision.intermediate_size, hidden, width),
        # Layer scale with the addition, twice a block.
        "residuals": elementwise(6 * tokens * hidden + 2 * hidden, width),
    }
    patches = frames * patches_per_frame(vision)
    return {
        "patches": linear(patches, _CHANNELS * vision.patch_size**2, hidden, width),
        "positions": elementwise(3 * patches * hidden, width),
        **{name: cost.times(vision.num_layers) for name, cost in block.items()},
    }


def tower_cost(vision: VisionConfig, frames: int, width: int) -> Cost:
    """The sum of ``tower_operations``."""
    return sum_costs(tower_operations(vision, frames, width).values())


def projector_cost(vision: VisionConfig, output_size: int, frames: int, width: int) -> Cost:
    """Norm, linear, squared ReLU and linear on every visual token of some frames.

    Args:
        output_size: width of the language model.
        width: bytes of an activation or weight.
    """
    tokens, inputs, hidden = frames * vision.tokens_per_frame, vision.projector_input_size, vision.projector_hidden_size
    return (
        elementwise(2 * tokens * inputs + inputs, width)
        + linear(tokens, inputs, hidden, width)
        + elementwise(2 * tokens * hidden, width)
        + linear(tokens, hidden, output_size, width)
    )
