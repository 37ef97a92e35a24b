"""Scores that an export brings along; its writer replaces this file (``export/copy_code.py``)."""

from hybridprune_megatron.method.scorer import Score

ANNOUNCED: tuple[type[Score], ...] = ()
