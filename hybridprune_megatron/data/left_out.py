"""What is left out of a job over many rows or samples: counted by reason, the first of them named."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: What is kept of what was left out, and what is printed of that.
MAX_LISTED = 100
MAX_PRINTED = 5


@dataclass
class LeftOut:
    """A tally.

    Attributes:
        left_out: how many, by reason.
        rows: the first of them, a line each.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    rows: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, line: str) -> None:
        """Counts one, and lists it if it is among the first.

        Args:
            line: which one it is, and what is wrong with it.
        """
        self.left_out[reason] += 1
        if len(self.rows) < MAX_LISTED:
            self.rows.append(" ".join(line.split()))

    def words(self, what: str) -> str:
        """How many, and why: "3 rows left out (1 json, 2 video)"."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{self.left_out.total()} {what} left out" + f" ({reasons})" * bool(reasons)

    def first(self) -> list[str]:
        """The lines of the first, indented for a terminal."""
        return [f"  {row}" for row in self.rows[:MAX_PRINTED]]
