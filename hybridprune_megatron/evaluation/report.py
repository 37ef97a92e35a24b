"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float) -> str:
    """0.256 as "25.6 %"."""
    return f"{100 * share:.1f} %"


def text_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; the first and the last to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < column < len(row) - 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
