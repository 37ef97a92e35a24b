"""The ``model.vision`` group of a RADIO tower, alone or inside of a video model, from its configuration and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from hybridprune_megatron.huggingface.fields import RADIO, TOWER, TOWER_ARGS_ONLY, VIDEO, Fields, Shape, dims, shown
from hybridprune_megatron.huggingface.names import TOWER_PREFIX

# Of the projector's weights, as Nemotron Nano V2 VL has it: as wide inside as an MLP of its language model.
_PROJECTOR_RATIO = 4
_PIXEL_SHUFFLE = 0.5
# Heads of the ViTs that RADIO towers are, by timm's name.
_VIT_HEADS = {"vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 16}


def video_model_vision(config: Mapping[str, Any], shape: Shape, blocks: int) -> dict[str, Any]:
    """The group of a ``NemotronH_Nano_VL_V2`` folder.

    Args:
        shape: of a tensor of theirs by name.
        blocks: of the tower.

    Raises:
        ValueError: a field is not known or not supported, or says something else than the tensors.
    """
    whole = Fields(config, VIDEO)
    tower = Fields(whole.get("vision_config") or {}, TOWER, "vision_config.")
    values = _tower_values(tower, _args(tower), shape, TOWER_PREFIX["nemotron_vl"], blocks)
    inner, _ = dims(shape, "mlp1.1.weight", 2)
    values |= {
        "frame_size": whole.whole("force_image_size"),
        "projector_hidden_size": inner,
        "pixel_shuffle": whole.number("downsample_ratio", default=_PIXEL_SHUFFLE),
    }
    for name, found in (
        ("patch_size", values["patch_size"]),
        ("vit_hidden_size", values["hidden_size"]),
        ("projector_hidden_size", inner),
    ):
        _compare(whole, name, found)
    for ours, theirs in (("image_mean", "norm_mean"), ("image_std", "norm_std")):
        if theirs not in whole:
            continue
        colours = whole.colours(theirs)
        if ours in values and values[ours] != colours:
            raise whole.refusal(theirs, f"vision_config.{theirs} is {shown(values[ours])}")
        values[ours] = colours
    return values


def tower_vision(
    config: Mapping[str, Any], shape: Shape, blocks: int, frame_size: int, hidden_size: int
) -> dict[str, Any]:
    """The group of a new video model with the tower of a ``radio`` folder.

    Args:
        shape: of a tensor of theirs by name.
        blocks: of the tower.
        frame_size: side of a frame, pixels.

    Raises:
        ValueError: as ``video_model_vision``.
    """
    tower = Fields(config, RADIO)
    return _tower_values(tower, {}, shape, TOWER_PREFIX["radio"], blocks) | {
        "frame_size": frame_size,
        "projector_hidden_size": _PROJECTOR_RATIO * hidden_size,
        "pixel_shuffle": _PIXEL_SHUFFLE,
    }


def _tower_values(tower: Fields, args: Mapping[str, Any], shape: Shape, prefix: str, blocks: int) -> dict[str, Any]:
    """What the tensors say of a tower, and its heads and colours, which only the configuration says."""
    _, positions, width = dims(shape, prefix + "patch_generator.pos_embed", 3)
    patch = isqrt(dims(shape, prefix + "patch_generator.embedder.weight", 2)[1] // 3)
    skipped, _ = dims(shape, prefix + "patch_generator.cls_token.token", 2)
    inner, _ = dims(shape, prefix + "blocks.0.mlp.fc1.weight", 2)
    # How class and register tokens divide changes no shape and no feature.
    classes = tower.whole("num_cls_tokens", 0, default=min(3, skipped))
    values: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": blocks,
        "num_attention_heads": _heads(tower, args),
        "intermediate_size": inner,
        "patch_size": patch,
        "position_grid_px": isqrt(positions) * patch,
        "num_cls_tokens": classes,
        "num_register_tokens": tower.whole("num_registers", 0, default=max(0, skipped - classes)),
    }
    if classes + values["num_register_tokens"] != skipped:
        raise tower.refusal("num_registers", f"with {classes} class tokens, but the tower has {skipped} of both")
    for name, found in (
        ("hidden_size", width),
        ("num_hidden_layers", blocks),
        ("patch_size", patch),
        ("max_img_size", values["position_grid_px"]),
    ):
        _compare(tower, name, found)
    if "mlp_ratio" in tower and abs(tower.number("mlp_ratio") * width - inner) > 0.5:
        raise tower.refusal("mlp_ratio", f"the tensors are {inner} wide inside and {width} outside")
    for ours, theirs in (("image_mean", "norm_mean"), ("image_std", "norm_std")):
        if theirs in tower:
            values[ours] = tower.colours(theirs)
    return values


def _compare(fields: Fields, name: str, found: int) -> None:
    if name in fields and fields.whole(name) != found:
        raise fields.refusal(name, f"the tensors have {found}")


def _args(tower: Fields) -> Mapping[str, Any]:
    """The arguments of the tower's training, where RADIO's own configuration says what it is built like."""
    args = tower.get("args") or {}
    if not isinstance(args, Mapping):
        raise tower.refusal("args", "expected an object")
    for name, allowed in TOWER_ARGS_ONLY.items():
        if args.get(name) not in allowed:
            raise tower.refusal(f"args.{name}", f"only {shown(allowed[-1])} is supported", args[name])
    return args


def _heads(tower: Fields, args: Mapping[str, Any]) -> int:
    if "num_attention_heads" in tower:
        return tower.whole("num_attention_heads")
    model = str(args.get("model"))
    heads = next((heads for name, heads in _VIT_HEADS.items() if model.startswith(name)), None)
    if heads is None:
        raise tower.refusal(
            "args.model",
            f"heads of this model are not known: add {tower.where}num_attention_heads to config.json",
            args.get("model"),
        )
    return heads
