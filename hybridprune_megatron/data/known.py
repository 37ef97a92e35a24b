"""What a row, or the meta of a sample, says about the right answer to its question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridprune_megatron.config.json_text import is_plain, short
from hybridprune_megatron.config.prompt_tokens import RESERVED_TOKENS

#: Choices of a question, and characters of the name of a kind.
MOST_CHOICES = 1000
MOST_KIND = 100


@dataclass(frozen=True)
class Known:
    """What is known about an answer; all of it may be missing.

    Attributes:
        answer: the right one; None: that of the conversation.
        choices: all answers that may be given, the right one among them; empty: any text.
        kind: groups questions in reports; None: it is in no group.
    """

    answer: str | None = None
    choices: tuple[str, ...] = ()
    kind: str | None = None

    @staticmethod
    def of(values: Mapping[str, Any], said: str | None = None) -> Known:
        """Reads ``answer``, ``choices`` and ``kind``; null and absent say nothing, other keys are not looked at.

        Args:
            said: the conversation's own answer, right where ``answer`` says nothing.

        Raises:
            ValueError: one of them is of another form, or the right answer is none of the choices.
        """
        answer, kind, given = values.get("answer"), values.get("kind"), values.get("choices")
        if answer is not None and not _is_text(answer):
            raise ValueError(f"answer {short(answer)}: expected text")
        if kind is not None and not (_is_text(kind) and is_plain(kind) and len(kind) <= MOST_KIND):
            raise ValueError(f"kind {short(kind)}: expected a line of text of at most {MOST_KIND} characters")
        choices = [] if given is None else given
        if not isinstance(choices, list | tuple) or not all(map(_is_text, choices)):
            raise ValueError(f"choices {short(given)}: expected a list of texts")
        if len(choices) > MOST_CHOICES or len(set(choices)) != len(choices):
            raise ValueError(f"choices {short(given)}: expected at most {MOST_CHOICES}, each once")
        for text in (*choices, *([] if answer is None else [answer])):
            if held := [token for token in RESERVED_TOKENS if token in text]:
                raise ValueError(f"answer {short(text)} holds {held[0]}: reserved for the prompt format")
        right = said if answer is None else answer
        if choices and right not in choices:
            raise ValueError(f"answer {short(right)} is none of the choices {short(list(choices))}")
        return Known(answer, tuple(choices), kind)

    def meta(self) -> dict[str, Any]:
        """What ``of`` reads back, for the meta of a sample; what is missing is left out."""
        found: dict[str, Any] = {"answer": self.answer, "choices": list(self.choices), "kind": self.kind}
        return {name: value for name, value in found.items() if value}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
