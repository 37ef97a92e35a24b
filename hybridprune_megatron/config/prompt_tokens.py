"""The special tokens that a prompt is written with; the format is in ``data/conversation.py``. Imports nothing."""

from __future__ import annotations

SYSTEM_TOKEN = "<SPECIAL_10>"
TURN_TOKEN = "<SPECIAL_11>"
END_TOKEN = "<SPECIAL_12>"
IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
VIDEO_TOKEN = "<video>"

#: Special tokens that the prompt itself writes: content that holds one would change the roles or the frame counts.
RESERVED_TOKENS = (SYSTEM_TOKEN, TURN_TOKEN, END_TOKEN, IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
