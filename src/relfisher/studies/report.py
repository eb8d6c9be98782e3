"""The output of every study: a table, files, figures, and how they were made."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from relfisher.files import remove_stale, write_atomically
from relfisher.studies.figures import encode

__all__ = ["ABSENT", "Invocation", "Report", "encoded", "markdown", "processor", "shown", "titled", "write"]

ABSENT = "-"
PACKAGES = ("relfisher", "torch", "numpy", "matplotlib")
PEER_PACKAGES = ("pytorch-optimizer", "schedulefree", "singd")

Rows = Sequence[Sequence[str]]
Lines = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Invocation:
    """How a command was run: it affects no results except times, but is of interest to readers."""

    command: str
    jobs: int


@dataclass(frozen=True)
class Report:
    """The results of a study in all forms.

    Attributes:
        table: the table in Markdown, with an explanation of its columns.
        about: measurements or settings for a JSON file called `about_name`.
        threads: the number of threads of each run.
        figures: the figures by name.
        terminal: the table for the terminal.
        files: the lines of further files by name; a file is compressed if its name ends in `.gz`.
        remark: text that the terminal shows below the table.
    """

    table: str
    about: Mapping[str, object]
    threads: Iterable[int]
    figures: Mapping[str, Figure]
    terminal: Table | None = None
    files: Mapping[str, Lines] = field(default_factory=dict)
    remark: str = ""
    about_name: str = "config"


def write(report: Report, invocation: Invocation, directory: Path) -> list[Path]:
    """Write a report; its files are written in order, each of them whole or not at all.

    Args:
        report: the results.
        invocation: how the command was run.
        directory: the directory to write to.

    Returns:
        The paths of the table and the figures.

    Raises:
        OSError: if a file cannot be written, with its path as `filename`.
    """
    about = {"command": invocation.command, **report.about, **_surroundings(invocation, report.threads)}
    files = {
        "table.md": report.table.encode(),
        f"{report.about_name}.json": (json.dumps(about, indent=1) + "\n").encode(),
        **{name: encoded(name, lines) for name, lines in report.files.items()},
    }
    for name, figure in report.figures.items():
        files |= {f"{name}.{kind}": content for kind, content in encode(figure).items()}
    remove_stale(directory)
    for name, content in files.items():
        write_atomically(directory / name, content)
    return [directory / "table.md", *(directory / f"{name}.png" for name in report.figures)]


def markdown(header: Sequence[str], rows: Rows, texts: int = 1) -> str:
    """Return a table as Markdown, with its first columns left-aligned as text."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def titled(title: str, header: Sequence[str], rows: Rows, absent: Mapping[str, str], notes: str) -> str:
    """Return the table of a race as Markdown, with a title above and notes below.

    Args:
        title: the title.
        header: the names of the columns.
        rows: a row for each method.
        absent: the reasons why other methods did not take part.
        notes: the notes.
    """
    others = [[method, reason, *[ABSENT] * (len(header) - 2)] for method, reason in absent.items()]
    return f"## {title}\n\n" + markdown(header, [*rows, *others]) + notes


def shown(title: str, header: Sequence[str], rows: Rows) -> Table:
    """Return the same table for the terminal."""
    table = Table(header[0], title=title, box=None, pad_edge=False)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def encoded(name: str, lines: Lines) -> bytes:
    """Return lines as comma-separated values, compressed if the name ends in `.gz`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    content = text.getvalue().encode()
    # With a time stamp, files of equal curves would differ.
    return gzip.compress(content, mtime=0) if name.endswith(".gz") else content


def processor() -> str:
    """Return the processor's name; on Linux, Python itself only knows the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _surroundings(invocation: Invocation, threads: Iterable[int]) -> dict[str, object]:
    """Return the package versions and the machine that produced the results."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "jobs": invocation.jobs,
            "threads_per_run": sorted(set(threads)),
            "torch_threads": torch.get_num_threads(),
        },
        "peers": {name: _version(name) for name in PEER_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
