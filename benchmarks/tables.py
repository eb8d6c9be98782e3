"""What benchmarks do with a table that they have made."""

from pathlib import Path

__all__ = ["tell"]


def tell(table: str, out: Path | None) -> None:
    """Print a table, and write it to `table.md` in a directory, if there is one."""
    print(table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(table)
