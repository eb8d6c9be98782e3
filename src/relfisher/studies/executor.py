"""Carries out cells, one after another or in worker processes, and saves every finished one."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar, runtime_checkable

from relfisher.studies.cells import Cell, Result
from relfisher.studies.store import Store

__all__ = ["RESUMED", "Reporter", "Watcher", "Work", "WorkerError", "execute"]

RESUMED = "already finished"
POLL_SECONDS = 0.1
C = TypeVar("C", bound=Cell)
R = TypeVar("R", bound=Result)

Reporter = Callable[[float, float], None]
"""Takes how much of a cell is done, from 0 to 1, and its latest cost."""

Work = Callable[[C, Reporter], R]
"""Carries out one cell; a worker process must be able to unpickle it."""


class WorkerError(RuntimeError):
    """A worker process ended without finishing its cell."""


@runtime_checkable
class Watcher(Protocol):
    """Follows the execution, as a progress display does."""

    def progressed(self, cell: Cell, fraction: float, cost: float) -> None:
        """A cell has come some way."""

    def finished(self, cell: Cell, ending: str) -> None:
        """A cell has ended, or was found finished."""


def execute(cells: Sequence[C], work: Work[C, R], store: Store[R], *, jobs: int, watcher: Watcher) -> dict[C, R]:
    """Carry out the cells that the store does not have.

    Args:
        cells: All cells that are wanted.
        work: Carries out one cell.
        store: Holds finished cells; each new one is saved as soon as it is finished.
        jobs: The number of worker processes; with 1 the cells are carried out in this process.
        watcher: Is told about every progress and end.

    Returns:
        The result of every cell, in their order.
    """
    found = {cell: result for cell in cells if (result := store.load(cell)) is not None}
    for cell in found:
        watcher.finished(cell, RESUMED)
    missing = [cell for cell in cells if cell not in found]
    if jobs > 1 and len(missing) > 1:
        found |= _in_workers(missing, work, store, jobs, watcher)
    else:
        for cell in missing:
            report = partial(watcher.progressed, cell)
            report(0.0, math.nan)
            found[cell] = work(cell, report)
            store.save(cell, found[cell])
            watcher.finished(cell, found[cell].ending)
    return {cell: found[cell] for cell in cells}


def _in_workers(missing: Sequence[C], work: Work[C, R], store: Store[R], jobs: int, watcher: Watcher) -> dict[C, R]:
    found: dict[C, R] = {}
    going: set[C] = set()
    context = multiprocessing.get_context("spawn")
    reports: SimpleQueue[tuple[int, float, float]] = context.SimpleQueue()
    theirs, ours = context.Pipe(duplex=False)

    def listen() -> None:
        while not reports.empty():
            number, fraction, cost = reports.get()
            going.add(missing[number])
            watcher.progressed(missing[number], fraction, cost)

    try:
        # Closing our end, which the end of this process also does, ends the workers whatever they are doing.
        with ProcessPoolExecutor(min(jobs, len(missing)), context, _begin, (reports, theirs)) as pool, ours:
            with _interrupts_held():
                tasks = enumerate(missing)
                futures = {pool.submit(_carry_out, number, cell, work, store): cell for number, cell in tasks}
            while futures:
                ready, _ = wait(futures, POLL_SECONDS, FIRST_COMPLETED)
                listen()
                for future in ready:
                    cell = futures.pop(future)
                    found[cell] = future.result()
                    going.discard(cell)
                    watcher.finished(cell, found[cell].ending)
    except BrokenProcessPool as error:
        listen()
        where = " or ".join(sorted(map(str, going))) or "its start"
        raise WorkerError(f"a worker process was lost during {where}") from error
    return found


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment, and from the processes that are started in it for good.

    It reaches them too, but this process decides what to stop.
    """
    if sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(reports: SimpleQueue[tuple[int, float, float]], lifeline: Connection) -> None:
    """Prepare a worker process."""
    global _reports
    _reports = reports
    # For systems where it is not held back already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    # It takes seconds, in which the process may already be ended.
    import torch

    torch.set_num_threads(1)


def _end_with(lifeline: Connection) -> None:
    """End this process once the other end of a pipe, to which nothing is ever written, is closed."""
    lifeline.poll(None)
    os._exit(1)


def _carry_out(number: int, cell: C, work: Work[C, R], store: Store[R]) -> R:
    """Carry out a cell in a worker process."""
    report = partial(_report, number)
    report(0.0, math.nan)
    result = work(cell, report)
    store.save(cell, result)
    return result


def _report(number: int, fraction: float, cost: float) -> None:
    _reports.put((number, fraction, cost))


_reports: SimpleQueue[tuple[int, float, float]]
