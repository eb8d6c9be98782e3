"""Tables and files of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from relfisher.studies.bench.peers import PACKAGES
from relfisher.studies.reproduce import Invocation, surroundings
from relfisher.studies.runs import write_atomically

__all__ = ["ABSENT", "markdown", "shown", "spread", "write"]

ABSENT = "-"

Rows = Sequence[Sequence[str]]


def markdown(title: str, header: Sequence[str], rows: Rows) -> str:
    """Returns a table as Markdown under a heading."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shown(title: str, header: Sequence[str], rows: Rows) -> Table:
    """Returns the same table as a person at the terminal sees it."""
    table = Table(header[0], title=title, box=None, pad_edge=False)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def spread(values: Sequence[float], specification: str) -> str:
    """Returns the range of values."""
    return f"{format(min(values), specification)} to {format(max(values), specification)}"


def write(
    directory: Path,
    name: str,
    text: str,
    content: Mapping[str, object],
    invocation: Invocation,
    threads: Sequence[int],
) -> None:
    """Writes a table, and what was measured together with how.

    Args:
        directory: Where to.
        name: Of the JSON file.
        text: The table.
        content: What was measured.
        invocation: How.
        threads: Of each run.
    """
    about = {"command": invocation.command, **surroundings(invocation, threads), "peers": _peers()}
    write_atomically(directory / "table.md", text.encode())
    write_atomically(directory / f"{name}.json", (json.dumps({**about, **content}, indent=1) + "\n").encode())


def _peers() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
