"""Checks of the texts that a user makes up: the name of a run, and what stands before a frame."""

from __future__ import annotations

import re
from itertools import product
from string import Formatter

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.prompt_tokens import RESERVED_TOKENS, VIDEO_TOKEN

#: File systems take 255 bytes; checkpoints are made under longer names.
_LONGEST_FOLDER = 200
_FIELDS = ("index", "seconds")
# No width of a million: it would be filled up with spaces.
_FORMAT = re.compile(r"0?\d{0,2}(\.\d{1,2})?[dfeg]?")
# The numbers in reserved tokens, which a frame's index could complete, and their digits.
_NUMBERS = range(13)


def check_run_name(name: str) -> None:
    """The name of a run is a folder below ``runs``, and names one folder only.

    Raises:
        ConfigError: it is not.
    """
    parts = name.split("/")
    if {"", ".", ".."} & set(parts):
        raise fail("name", name, "must be a folder below runs", "use a plain name, and set output_dir for a place")
    if max(len(part.encode()) for part in parts) > _LONGEST_FOLDER:
        raise fail("name", name, f"is longer than the {_LONGEST_FOLDER} bytes of a folder's name", "use a shorter name")


def check_frame_text(text: str) -> None:
    """``data.frame_text`` uses its two fields, in a format that keeps them short, and makes no special token.

    Raises:
        ConfigError: it does not.
    """
    key, example = "data.frame_text", "e.g. 'Frame {index} sampled at {seconds:.2f} seconds: '"
    try:
        for _, name, form, conversion in Formatter().parse(text):
            if name is not None and not (name in _FIELDS and not conversion and _FORMAT.fullmatch(form or "")):
                raise ValueError(name)
        written = {text.format(index=index, seconds=float(second)) for index, second in product(_NUMBERS, _NUMBERS)}
    except ValueError as error:
        raise fail(key, repr(text), "may use {index} and {seconds} only", example) from error
    for token in (*RESERVED_TOKENS, VIDEO_TOKEN):
        if any(token in each for each in written):
            raise fail(key, repr(text), f"writes {token}, which marks turns and frames", example)
