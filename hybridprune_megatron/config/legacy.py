"""A ``reduction`` as older saved runs and exported folders have it: flat keys, and fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hybridprune_megatron.method.front import FRONTS, RandomFront
from hybridprune_megatron.method.schedule import SCHEDULES
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.plugins import Registry

#: Flat key -> the part that has it today, and its name there.
MOVED: dict[str, tuple[str, str]] = {
    "scorer": ("score", "name"),
    **{name: ("score", name) for name in ("query_rows", "attention_pooling", "attention_causal")},
    **{name: ("score", name) for name in ("mamba_decay", "mamba_dt", "mamba_function", "mamba_pooling", "seed")},
    **{name: ("schedule", name) for name in ("midpoint", "slope", "stages", "floor")},
    "step_layer": ("schedule", "layer"),
    **{name: ("select", name) for name in ("min_tokens", "min_tokens_per_frame", "smoothing_frames", "frame_share")},
    **{name: ("select", name) for name in ("dropped", "multiple_of", "local_choice")},
    "front_retention": ("front", "retention"),
}
_PARTS: dict[str, Registry[Any]] = {"score": SCORERS, "schedule": SCHEDULES, "front": FRONTS}


def is_flat(values: Mapping[str, Any]) -> bool:
    """Whether a reduction has keys of version 0.1."""
    return bool(set(values) & set(MOVED))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys under the parts that have them today; what is nested already stays where it is.

    A flat configuration names the keys of every score, schedule and front; those of parts that it does not choose go.
    What is stored names all keys there were, so a part that lacks only keys that came later gets their old values.
    """
    if not is_flat(values):
        return dict(values) | {
            part: _with_later_keys(registry, values[part])
            for part, registry in _PARTS.items()
            if isinstance(values.get(part), Mapping)
        }
    result: dict[str, Any] = {}
    for key, value in values.items():
        part, name = MOVED.get(key, (key, ""))
        if name or (part in _PARTS and isinstance(value, str)):
            result.setdefault(part, {})[name or "name"] = value
        elif isinstance(value, Mapping):
            result.setdefault(part, {}).update(value)
        else:
            result[part] = value
    if "seed" in values and result.get("front", {}).get("name") == RandomFront.name:
        result["front"]["seed"] = values["seed"]
    for part, registry in _PARTS.items():
        chosen = result.get(part, {})
        if isinstance(chosen, dict) and "name" in chosen:
            known = {"name", *(field.name for field in fields(registry.find(chosen["name"])))}
            result[part] = _with_later_keys(
                registry, {name: value for name, value in chosen.items() if name in known}, always=True
            )
    return result


def _with_later_keys(registry: Registry[Any], part: Mapping[str, Any], always: bool = False) -> dict[str, Any]:
    owner = next((known for known in registry.built_in if known.name == part.get("name")), None)
    if owner is None:
        return dict(part)
    stored = always or {each.name for each in fields(owner)} - set(owner.before) <= set(part)
    return {**(owner.before if stored else {}), **part}
