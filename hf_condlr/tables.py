"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "") -> str:
    """A Markdown table.

    Args:
        header: The columns' titles.
        rows: The cells of each row, written with `str`; `|` is escaped.
        align: One letter a column, "l" or "r"; the last letter holds for all further columns. Empty: all left.

    Returns:
        The table, without a newline at its end.
    """
    sides = (align or "l").ljust(len(header), (align or "l")[-1])
    rule = ["---:" if side == "r" else "---" for side in sides[: len(header)]]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
