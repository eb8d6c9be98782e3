"""How a command carries out runs that can be interrupted."""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from relfisher.studies.runs import ArrayStore, Record, Run

__all__ = ["command_line", "resumable", "tell"]

WORKER_STATUS = 1
INTERRUPTED_STATUS = 130


@contextmanager
def resumable(store: ArrayStore) -> Iterator[None]:
    """Says how to go on after an interruption, and at the end which files were damaged."""
    from relfisher.studies.jobs import WorkerError

    try:
        yield
    except KeyboardInterrupt as error:
        missing = f"the same command goes on with the runs missing in {store.directory}"
        print(f"relfisher: stopped; {missing}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_STATUS) from error
    except WorkerError as error:
        print(f"relfisher: {error}; the same command goes on with what is missing", file=sys.stderr)
        raise typer.Exit(WORKER_STATUS) from error
    for path in store.damaged:
        print(f"relfisher: {path} was unreadable, its run was done again", file=sys.stderr)


def tell(records: Mapping[Run, Record]) -> None:
    """Print the warnings of runs, each once."""
    messages = {message: run for run, record in records.items() for message in record.warnings}
    for message, run in messages.items():
        print(f"relfisher: warning in {run}: {message}", file=sys.stderr)


def command_line() -> str:
    """Return the command that this process was started with."""
    return shlex.join(["relfisher", *sys.argv[1:]])
