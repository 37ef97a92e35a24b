"""Energon's loader state as plain values and back, so that a checkpoint holds it without pickled classes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

#: The classes that a state may hold; nothing else is ever built from a checkpoint.
_CLASSES: dict[str, type] = {
    each.__name__: each
    for each in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState)
}
_TYPE = "__type__"
_PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def to_plain(value: Any) -> Any:
    """Strings, numbers, lists, string-keyed dicts and tensors that ``from_plain`` turns back.

    Raises:
        TypeError: the value holds something else.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [to_plain(each) for each in value]
    if isinstance(value, tuple):
        return {_TYPE: "tuple", "items": [to_plain(each) for each in value]}
    if isinstance(value, dict):
        kind = "FlexState" if isinstance(value, FlexState) else "dict"
        return {_TYPE: kind, "items": [[to_plain(key), to_plain(each)] for key, each in value.items()]}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", "items": torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)[: len(value)]}
    if isinstance(value, np.ndarray):
        return {_TYPE: "ndarray", "items": torch.from_numpy(value.copy())}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        items = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {_TYPE: type(value).__name__, "items": items}
    raise TypeError(f"loader state holds a {type(value).__name__}: to_plain does not know it")


def from_plain(value: Any) -> Any:
    """The reverse of ``to_plain``.

    Raises:
        ValueError: the value was not written by ``to_plain``.
    """
    if isinstance(value, list):
        return [from_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TYPE)
    items: Any = value.get("items")
    if kind in ("dict", "FlexState"):
        pairs = ((from_plain(key), from_plain(each)) for key, each in items)
        return FlexState(pairs) if kind == "FlexState" else dict(pairs)
    if kind == "tuple":
        return tuple(from_plain(each) for each in items)
    if kind == "bytes":
        return items.cpu().numpy().tobytes()
    if kind == "ndarray":
        return items.cpu().numpy()
    if kind in _CLASSES:
        return _CLASSES[kind](**{name: from_plain(each) for name, each in items.items()})
    raise ValueError(f"loader state of type {kind!r}: the checkpoint was not written by this program")
