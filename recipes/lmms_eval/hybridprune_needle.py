"""The Python part of hybridprune_needle.yaml. lmms-eval loads it alone, so it imports nothing of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The path of the clip, which lies beside this file."""
    return [str(Path(__file__).resolve().parent / doc["video"])]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the text is the answer and nothing else; lmms-eval has cut the white space around it."""
    return {"exact_match": float(results[0] == doc["answer"])}
