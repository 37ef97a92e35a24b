"""The one way in which a tokenizer is loaded: from a folder, without its code, a question or a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.json_text import read_json

_CONFIG_FILE = "tokenizer_config.json"
# Older transformers wrote paths of these into the configuration; they are not opened where tokenizer.json is there.
_UNREAD = ("tokenizer_file", "special_tokens_map_file", "added_tokens_file")


def load_tokenizer(folder: str | Path) -> Any:
    """The Hugging Face tokenizer of a folder.

    Raises:
        ValueError: it cannot be read, needs code of its own, or names files elsewhere. One line.
    """
    # After the checks of the caller: transformers takes seconds to import.
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        _check_files(folder)
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    # A broken file ends in errors of every kind, down to panics of the library below, which are not an Exception.
    except BaseException as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason or "custom code" in reason:
            reason = "it needs code of its own (auto_map), which is never run"
        raise ValueError(
            f"data.tokenizer={folder} cannot be read ({reason:.300}): give a folder with a Hugging Face tokenizer"
        ) from None


def _check_files(folder: Path) -> None:
    """The configuration is JSON, and names no file outside of the folder."""
    if not folder.is_dir():
        raise ValueError("not a folder")
    odd = next((entry for entry in folder.iterdir() if not (entry.is_file() or entry.is_dir())), None)
    if odd is not None:
        # Reading a pipe would never end.
        raise ValueError(f"{odd.name!a:.80} is not a file")
    path = folder / _CONFIG_FILE
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{_CONFIG_FILE} is not a JSON object")
    whole = (folder / "tokenizer.json").is_file()
    for key, name in _named_files(settings):
        if Path(name).name != name and not (whole and key in _UNREAD):
            raise ValueError(f"{_CONFIG_FILE} has {key}={name!a:.80}, which is not in the folder")


def _named_files(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        for name in value if isinstance(value, list) else [value]:
            if key.endswith(("_file", "_files")) and name is not None:
                yield key, str(name)
