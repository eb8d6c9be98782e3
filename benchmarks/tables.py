"""What benchmarks do with a table that they have made."""

from pathlib import Path

__all__ = ["tell"]


def tell(table: str, out: Path | None, name: str = "table.md") -> None:
    """Print a table, and write it to a file of this name in a directory, if there is one."""
    print(table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(table)
