"""Numbers in short form, and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["size", "table"]


def size(value: float, unit: str, base: int = 1000) -> str:
    """Format a number of bytes or operations in short form."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < base or prefix == "T":
            middle = "i" if prefix and base == 1024 else ""
            return f"{value:.3g} {prefix.upper() if middle else prefix}{middle}{unit}"
        value /= base
    raise AssertionError("unreachable")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Format rows of cells as lines with aligned columns."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
