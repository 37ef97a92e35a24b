"""What a caller gives the processor to look at: files, frames, and the parts of a chat that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor

from hybridprune_megatron.checks import closest
from hybridprune_megatron.data.conversation import MEDIA_TOKENS

_SCHEME = re.compile(r"(?P<any>[a-z][a-z0-9+.-]*)://|(?P<bare>data|file):", flags=re.ASCII | re.IGNORECASE)


def check_parts(conversations: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Refuses what a part of a chat says and nobody reads.

    Keys that hold None say nothing: tables of several kinds of parts have them.

    Args:
        conversations: messages that ``read_conversation`` has taken.

    Raises:
        ValueError: an unknown key, or a part that names two files.
    """
    for part in _parts(conversations):
        kind = part["type"]
        sources = [kind, "path", "url"] if kind in MEDIA_TOKENS else [kind]
        given = [key for key, value in part.items() if key != "type" and value is not None]
        for key in given:
            if key not in sources:
                nearest = closest(str(key), sources)
                fix = f"did you mean {nearest!r}?" if nearest else "leave it out"
                raise ValueError(f"{kind} part with {key!r:.60}: it may have {', '.join(map(repr, sources))}; {fix}")
        if len(given) > 1:
            raise ValueError(f"{kind} part with {given[0]!r} and {given[1]!r}: both name its file; give one")


def named_media(conversations: Iterable[Sequence[Mapping[str, Any]]], kind: str) -> list[Any]:
    """What the parts of a kind ("video" or "image") name, one source for each.

    Args:
        conversations: messages that ``check_parts`` has taken.
        kind: of ``MEDIA_TOKENS``.

    Raises:
        ValueError: a part names nothing, or several files.
    """
    found = []
    for part in _parts(conversations):
        if part["type"] != kind:
            continue
        named = [part[key] for key in (kind, "path", "url") if part.get(key) is not None]
        if not named:
            raise ValueError(f"{kind} part without a file: put its path under {kind!r}")
        source = named[0]
        if isinstance(source, list | tuple) and (kind == "image" or not _are_frames(source)):
            held = ", ".join(sorted({type(each).__name__ for each in source})) or "nothing"
            allowed = "one image" if kind == "image" else "one file, or the frames as arrays, tensors or PIL images"
            raise ValueError(f"{kind} part with a list of {held}: give {allowed}")
        if kind == "video" and _is_picture(source):
            raise ValueError("video part with one image: give a list of frames, or make it an image part")
        found.append(source)
    return found


def flat_images(images: Any) -> list[Any]:
    """Images of all texts in one list: files, or one image each."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [each for part in images for each in flat_images(part)]
    return [_local(images, "image")]


def flat_videos(videos: Any) -> list[Any]:
    """Videos of all texts in one list: files, or the frames of a video, joined where they came in a list.

    Raises:
        ValueError: a URL of something else than a local file, or frames that do not go together.
    """
    if videos is None:
        return []
    if not isinstance(videos, list | tuple):
        return [_local(videos, "video")]
    if _are_frames(videos):
        return [_joined(videos)]
    return [video for part in videos for video in flat_videos(part)]


def _parts(conversations: Iterable[Sequence[Mapping[str, Any]]]) -> Iterable[Mapping[str, Any]]:
    contents = (message["content"] for messages in conversations for message in messages)
    return (part for content in contents if isinstance(content, list) for part in content)


def _local(source: Any, kind: str) -> Any:
    """The path that a file:// URL means; anything that is not a URL as it is.

    Raises:
        ValueError: a URL of another kind, or of another machine.
    """
    scheme = _SCHEME.match(source) if isinstance(source, str) else None
    if scheme is None:
        return source
    name = (scheme["any"] or scheme["bare"]).lower()
    if name == "data":
        raise ValueError(f"{kind} {source!r:.40}: the file itself as text; decode it and give its bytes")
    if name != "file":
        raise ValueError(f"{kind} {source!r:.80} is an address and nothing is fetched; download it and give its path")
    path = source[len("file:") :]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ValueError(f"{kind} {source!r:.80} is a file of the machine {host!r:.40}: write file:///path/of/it")
        path = slash + path
    return unquote(path)


def _are_frames(given: Sequence[Any]) -> bool:
    """Whether a list is one video: every entry is a picture."""
    return bool(given) and all(map(_is_picture, given))


def _is_picture(given: Any) -> bool:
    return _is_pil(given) or (isinstance(given, np.ndarray | Tensor) and given.ndim in (2, 3))


def _is_pil(given: Any) -> bool:
    return hasattr(given, "save") and hasattr(given, "convert")


def _joined(frames: Sequence[Any]) -> Any:
    """Frames of a video: PIL images in a list, arrays or tensors in one.

    Raises:
        ValueError: they are of several kinds or sizes.
    """
    kinds = {f"PIL {list(each.size)}" if _is_pil(each) else f"{each.dtype} {list(each.shape)}" for each in frames}
    if len(kinds) > 1:
        shown = " and ".join(sorted(kinds)[:2])
        raise ValueError(f"video of frames that differ, {shown}: give frames of one kind and size")
    if _is_pil(frames[0]):
        return list(frames)
    return torch.stack(list(frames)).detach() if isinstance(frames[0], Tensor) else np.stack(frames)
