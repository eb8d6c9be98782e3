"""Run a study that can be interrupted, and show its results."""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from relfisher.cli.output import FAILURE_STATUS, failure, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from relfisher.studies.cells import Cell, Result
    from relfisher.studies.engine import Outcome, Study
    from relfisher.studies.executor import Work
    from relfisher.studies.report import Report
    from relfisher.studies.store import Store

    C = TypeVar("C", bound=Cell)
    R = TypeVar("R", bound=Result)
    S = TypeVar("S", bound=Study[Any])

__all__ = ["carried_out", "leave"]

INTERRUPTED_STATUS = 130


def carried_out(study: S, work: Work[C, R], decode: Callable[..., R], out: Path, jobs: int = 1) -> Outcome[S, C, R]:
    """Run a study, with its progress on the terminal, followed by the warnings of its cells.

    Args:
        study: the study.
        work: runs one cell.
        decode: reconstructs a result from the arrays in its file.
        out: the output directory.
        jobs: the number of worker processes.

    Returns:
        All results.
    """
    from rich.console import Console

    from relfisher.studies.engine import carry_out
    from relfisher.studies.progress import Display
    from relfisher.studies.store import Store

    store = Store(out / "runs", decode)
    with _resumable(store), Display(Console(), study.planned) as display:
        outcome = carry_out(study, work, store, jobs=jobs, watcher=display)
    messages = {message: cell for cell, result in outcome.records.items() for message in result.warnings}
    for message, cell in messages.items():
        tell(f"warning in {cell}: {message}")
    return outcome


def leave(report: Report, out: Path, jobs: int = 1, *, repeatable: bool = True) -> None:
    """Write a report and show it on the terminal, also if it cannot be written.

    Args:
        report: the report.
        out: the output directory.
        jobs: the number of worker processes.
        repeatable: whether the same command makes the report again from the runs in `out`. If not, a table that
            cannot be written is printed.

    Raises:
        typer.Exit: if a file cannot be written.
    """
    from rich.console import Console

    from relfisher.studies.report import Invocation, write

    error, paths = None, []
    try:
        paths = write(report, Invocation(shlex.join(["relfisher", *sys.argv[1:]]), jobs), out)
    except OSError as raised:
        error = raised
    if report.terminal is not None:
        Console().print(report.terminal)
    print(report.remark, end="")
    if error is not None:
        if repeatable:
            tell(f"{failure(error)}; all runs are safe in {out / 'runs'}, the same command writes the rest from them")
        else:
            print(report.table)
            tell(f"{failure(error)}; standard output has the whole table, the same command measures again")
        raise typer.Exit(FAILURE_STATUS) from error
    for name, path in zip(("table:  ", "picture:"), paths, strict=False):
        print(name, path)


@contextmanager
def _resumable(store: Store[R]) -> Iterator[None]:
    """Explain how to resume after an interruption or a failure and, at the end, list damaged files."""
    from relfisher.studies.executor import WorkerError

    try:
        yield
    except KeyboardInterrupt as error:
        tell(f"stopped; the same command goes on with the runs missing in {store.directory}")
        raise typer.Exit(INTERRUPTED_STATUS) from error
    except WorkerError as error:
        tell(f"{error}; the same command goes on with what is missing")
        raise typer.Exit(FAILURE_STATUS) from error
    except OSError as error:
        tell(f"{failure(error)}; finished runs are safe in {store.directory}, the same command goes on with the others")
        raise typer.Exit(FAILURE_STATUS) from error
    for path in store.damaged:
        tell(f"{path} was unreadable, its run was repeated")
