"""Energon data sets as they lie on disk, checked before Energon reads them.

Energon calls what a description names (``__module__``, ``__function__``, ``sample_loader``) and opens shards wherever
they are said to be. So descriptions are read here first. Taken are folders as ``data.shards.ShardWriter`` writes them
and plain blends of such folders, nothing else. Both may lie in a store, if the configuration says so; what a
description names lies where the description lies.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]  # the package ships no types

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.features import FeaturesInfo, check_folder, read_info
from hybridprune_megatron.config.json_text import is_plain, parse_json, short
from hybridprune_megatron.config.stores import AnyPath, StoreError, StorePath, located

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_META = ".nv-meta"
_SAMPLES = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
_BLEND = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
_PARTS = ("train", "val", "test")
_MOST_BYTES = 2**26
_MOST_YAML_BYTES = 2**22
#: Samples of a folder (Energon lists every hundredth), and those of them that lost or cut shards are said to have.
_MOST_SAMPLES = 10**8
_MOST_LOST = 10**5
_MOST_SETS = 1000
_MOST_NESTED = 8
_MOST_WEIGHT = 1e12
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


@dataclass(frozen=True)
class DataSet:
    """A folder of shards, and what is read of it.

    Attributes:
        folder: where it lies, links resolved.
        part: of its split: train, val or test.
        shards: names of that part's shards, in order, and how many samples each has.
        excluded: names of samples to leave out, as ``shard/key``.
        weight: its share of a blend; None outside of one.
    """

    folder: AnyPath
    part: str
    shards: tuple[tuple[str, int], ...]
    excluded: frozenset[str]
    weight: float | None = None


def check_data_sets(cfg: Config) -> None:
    """The configured data sets can be read, and are for the configured model.

    Raises:
        ConfigError: the first that is not.
    """
    for key, part in (("train", "train"), ("validation", "val")):
        path = getattr(cfg.data, key)
        if path is None:
            continue
        sets = read_data_sets(path, part, f"data.{key}")
        for each in sets:
            check_folder(cfg, f"data.{key}={each.folder}", each.folder)
        features_of(sets, f"data.{key}={path}")
        samples = sum(count for each in sets for _, count in each.shards)
        readers = cfg.trainer.global_batch_size * max(1, cfg.data.num_workers)
        if key == "train" and samples < readers:
            reason = (
                f"times data.num_workers={cfg.data.num_workers} are {readers} readers for the {samples} samples of "
                f"data.train={path}"
            )
            fix = f"set it so that there are at most {samples}"
            raise fail("trainer.global_batch_size", cfg.trainer.global_batch_size, reason, fix)


def features_of(sets: Sequence[DataSet], where: str) -> FeaturesInfo | None:
    """What the data sets say about their features, None if they hold videos.

    Raises:
        ConfigError: they do not agree.
    """
    found = [read_info(each.folder, where) for each in sets]
    towers = {info.tower if info else None for info in found}
    if len(towers) > 1:
        kinds = sorted("videos" if each is None else f"features of tower {each}" for each in towers)
        raise ConfigError(
            f"{where} blends {', '.join(kinds)}: blend either videos, or features precomputed with the same weights"
        )
    return found[0]


def read_data_sets(path: str | AnyPath, part: str, key: str) -> list[DataSet]:
    """The folders that a path stands for: itself, or those of a blend.

    Args:
        path: a folder with shards, or the .yaml of a blend; a text may name one in a store.
        part: of the split: train, val or test.
        key: what sets the path, for errors.

    Raises:
        ConfigError: it is not a data set, or one that could make Energon run code or read other files.
    """
    place = located(path, key)
    with _one_error(f"{key}={path}"):
        if not place.is_file():
            return [_read_folder(place, part)]
        sets = [replace(each, weight=share) for each, share in islice(_read_blend(place, part), _MOST_SETS + 1)]
        if len(sets) > _MOST_SETS:
            raise ValueError(f"more than {_MOST_SETS} data sets in a blend")
        return sets


def shard_counts(folder: Path, key: str) -> dict[str, int]:
    """Number of samples by shard of a folder, of all parts of its split.

    Args:
        key: what sets it, for errors.

    Raises:
        ConfigError: as ``read_data_sets``.
    """
    with _one_error(f"{key}={folder}"):
        _own_file(folder.resolve(), f"{_META}/split.yaml")
        return _read_counts(folder.resolve())


class _OtherSplitError(ValueError):
    """A data set that is whole, of another part of the split."""


@contextmanager
def _one_error(where: str) -> Iterator[None]:
    try:
        yield
    except (_OtherSplitError, StoreError) as error:
        raise ConfigError(f"{where}: {error}") from None
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise ConfigError(
            f"{where} is not an Energon data set that can be read ({reason!s:.800}): give a folder as "
            "hybridprune shards writes it, or a .yaml that blends such folders"
        ) from None


def _read_blend(file: AnyPath, part: str, outer: tuple[AnyPath, ...] = ()) -> Iterator[tuple[DataSet, float]]:
    """The folders of a blend and of the blends in it, each with its share of all samples."""
    file = file.resolve() if isinstance(file, Path) else file
    if file in outer or len(outer) > _MOST_NESTED:
        raise ValueError(f"{file} blends itself, or blends are nested more than {_MOST_NESTED} times")
    content = _read_yaml(file)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or content != {**_BLEND, "splits": splits}:
        raise ValueError(f"{file} says {short(content)}: allowed is {_BLEND} with splits, each a blend of data sets")
    if part not in splits:
        raise ValueError(f"{file} has no split {part}")
    blend = splits[part]["blend"] if isinstance(splits[part], dict) and set(splits[part]) == {"blend"} else splits[part]
    entries = blend if isinstance(blend, list) else [blend]
    if not 0 < len(entries) <= _MOST_SETS:
        raise ValueError(f"{file} blends {len(entries)} data sets: from 1 to {_MOST_SETS} are allowed")
    weights = [_weight(entry, file) for entry in entries]
    for entry, weight in zip(entries, weights):
        share, path, inner_part = weight / sum(weights), file.parent / entry["path"], entry.get("split_part", part)
        if path.is_file():
            yield from ((each, share * inner) for each, inner in _read_blend(path, inner_part, (*outer, file)))
        else:
            yield _read_folder(path, inner_part), share


def _weight(entry: Any, file: AnyPath) -> float:
    """The weight of an entry of a blend.

    Raises:
        ValueError: the entry says more than what is blended.
    """
    if not isinstance(entry, dict) or not set(entry) <= {"path", "weight", "split_part"}:
        raise ValueError(f"{file} blends {short(entry)}: allowed are path, weight and split_part")
    path, weight = entry.get("path"), entry.get("weight", 1.0)
    if not isinstance(path, str) or not is_plain(path) or "://" in path:
        raise ValueError(f"{file} blends the path {short(path)}: give a folder or another blend")
    if entry.get("split_part", "train") not in _PARTS:
        raise ValueError(f"{file} asks for split_part {short(entry['split_part'])}: choose from {', '.join(_PARTS)}")
    known = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not known or not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise ValueError(
            f"{file} gives {path} the weight {short(weight)}: a number from {1 / _MOST_WEIGHT:g} to {_MOST_WEIGHT:g}"
        )
    return float(weight)


def _read_folder(folder: AnyPath, part: str) -> DataSet:
    """What is read of a folder of shards."""
    folder = folder.listed() if isinstance(folder, StorePath) else folder.resolve()
    counts = _read_counts(folder)
    described = _own_file(folder, f"{_META}/dataset.yaml")
    content = _read_yaml(described)
    if content != _SAMPLES:
        raise ValueError(f"{described} says {short(content)}, which could run code: allowed is {_SAMPLES}")
    split_file = _own_file(folder, f"{_META}/split.yaml")
    split = _read_yaml(split_file)
    parts = split.get("split_parts") if isinstance(split, dict) else None
    if not isinstance(parts, dict) or not set(split) <= {"split_parts", "exclude"}:
        raise ValueError(f"{split_file} says {short(split)}: allowed are split_parts and exclude")
    excluded = frozenset(_expanded(split.get("exclude", []), _MOST_LOST))
    names = [name for name in _expanded(parts.get(part, []), len(counts)) if name not in excluded]
    for name, times in Counter(names).items():
        if name not in counts or times > 1:
            wrong = "twice" if times > 1 else "which .info.json does not count"
            raise ValueError(f"{split_file} names the shard {short(name)}, {wrong}")
    if not names:
        others = [name for name in _PARTS if name != part and parts.get(name)]
        if not others:
            raise ValueError(f"{split_file} has no shards for {part}")
        raise _OtherSplitError(
            f"{folder} has no samples for {part}, but for {', '.join(others)}: write it with hybridprune shards "
            f'--split {part}, or name it in a blend with "split_part: {others[0]}"'
        )
    shards = tuple((name, counts[name]) for name in names)
    return DataSet(folder, part, shards, frozenset(name for name in excluded if "/" in name))


def _read_counts(folder: AnyPath) -> dict[str, int]:
    """Number of samples by shard. All shards lie in the folder, and can hold that many."""
    file = _own_file(folder, f"{_META}/.info.json")
    if _size(file) > _MOST_BYTES:
        raise ValueError(f"{file} has more than {_MOST_BYTES} bytes")
    try:
        info = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    counts = info.get("shard_counts") if isinstance(info, dict) else None
    if not isinstance(counts, dict) or not counts or not set(info) <= {"energon_version", "shard_counts"}:
        raise ValueError(f"{file} says {short(info)}: expected energon_version and shard_counts")
    lost = 0
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= _MOST_SAMPLES:
            raise ValueError(f"{file} says {short(count)} samples of {short(name)}")
        lost += max(0, count - _most_samples(folder, name))
    if sum(counts.values()) > _MOST_SAMPLES or lost > _MOST_LOST:
        raise ValueError(f"{file} says {sum(counts.values())} samples, {lost} more than its shards can hold")
    return counts


def _most_samples(folder: AnyPath, name: str) -> int:
    """How many samples a shard can hold; 0 for one that is lost, which is not an error.

    Raises:
        ValueError: it is not a tar file in the folder.
    """
    steps = name.split("/")
    plain = is_plain(name) and name.endswith(".tar") and len(name) <= 250 and not re.search(r"[\\:{}]", name)
    if not plain or {"", ".", ".."} & {*steps}:
        raise ValueError(f"the shard {short(name)}: expected the name of a .tar in {folder}")
    tar, index = (_inside(folder, each) for each in (name, f"{name}.idx"))
    for path in (tar, index):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a plain file")
    # An index has the offset of every sample, and of the end. A sample is a header at least.
    if index.exists():
        return _size(index) // 8 - 1
    return _size(tar) // 512 if tar.exists() else 0


def _own_file(folder: AnyPath, name: str) -> AnyPath:
    path = _inside(folder, name)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path


def _size(path: AnyPath) -> int:
    return path.size() if isinstance(path, StorePath) else path.stat().st_size


def _inside(folder: AnyPath, name: str) -> AnyPath:
    """A path in a folder, which no link leads out of."""
    if isinstance(folder, StorePath):
        # Stores have no links, and shards' names were looked at.
        return folder / name
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(folder):
        raise ValueError(f"{path} leads out of {folder}: put the file itself there")
    return path


def _read_yaml(path: AnyPath) -> Any:
    """Plain YAML: no aliases, of which few lines can become any size."""
    if _size(path) > _MOST_YAML_BYTES:
        raise ValueError(f"{path} has more than {_MOST_YAML_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MOST_NESTED:
                raise ValueError("it has aliases, or is nested too deeply")
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not plain YAML ({' '.join(str(error).split()):.200})") from None


def _expanded(names: Any, most: int) -> list[str]:
    """Names with their braces expanded, ``shard-{00..11}.tar`` and ``{a,b}.tar``; ``most`` are allowed."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{short(names)}: expected a list of names")
    found: list[str] = []
    for name in names:
        pieces = _BRACES.split(name)
        if any(set(r"{}\\") & set(text) for text in pieces[::2]):
            raise ValueError(f"{short(name)}: braces may not be nested, nor names have backslashes")
        choices = [_choices(piece, most) if number % 2 else [piece] for number, piece in enumerate(pieces)]
        if len(found) + math.prod(map(len, choices)) > most:
            raise ValueError(f"{short(name)}: more than {most} names")
        found += map("".join, product(*choices))
    return found


def _choices(expression: str, most: int) -> list[str]:
    """What stands for an expression in braces."""
    match = _RANGE.fullmatch(expression)
    if match is None:
        if "," not in expression:
            raise ValueError(f"{{{expression[:60]}}}: allowed in braces are a,b and 1..2")
        return expression.split(",")
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= most:
        raise ValueError(f"{{{expression}}}: more than {most} names")
    padded = any(len(text) > 1 and text[0] == "0" for text in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    step = 1 if first <= last else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]
