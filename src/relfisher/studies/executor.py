"""Run cells, one after another or in worker processes, and save the result of each as soon as it is finished."""

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
from threading import Thread, current_thread, main_thread
from typing import Protocol, TypeVar, runtime_checkable

from relfisher.studies.cells import Cell, Result
from relfisher.studies.store import Store

__all__ = ["RESUMED", "Reporter", "Watcher", "Work", "WorkerError", "execute"]

RESUMED = "already finished"
POLL_SECONDS = 0.1
C = TypeVar("C", bound=Cell)
R = TypeVar("R", bound=Result)

Reporter = Callable[[float, float], None]
"""A function of the finished fraction of a cell, from 0 to 1, and its latest cost."""

Work = Callable[[C, Reporter], R]
"""A function that runs one cell; worker processes must be able to unpickle it."""


class WorkerError(RuntimeError):
    """A worker process ended without finishing its cell."""


@runtime_checkable
class Watcher(Protocol):
    """An observer of the execution, such as a progress display."""

    def progressed(self, cell: Cell, fraction: float, cost: float) -> None:
        """Handle the progress of a cell."""

    def finished(self, cell: Cell, ending: str) -> None:
        """Handle a cell that has ended, or was already finished."""


def execute(cells: Sequence[C], work: Work[C, R], store: Store[R], *, jobs: int, watcher: Watcher) -> dict[C, R]:
    """Run the cells whose results are not stored yet.

    Args:
        cells: all required cells.
        work: runs one cell.
        store: holds the results of finished cells; each new result is saved at once.
        jobs: the number of worker processes; with 1, the cells run in this process.
        watcher: receives all progress.

    Returns:
        The result of every cell, in the order of the cells.
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
        # Closing this end, which also happens when this process ends, terminates the workers at any point.
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
    """Hold back Ctrl-C inside this context, and block it permanently in the processes that are started in it.

    They receive it as well, but this process decides what to stop. Blocking it in this thread is not enough for this
    process: another thread may receive it.
    """
    if sys.platform == "win32":
        yield
        return
    held: list[int] = []
    handles = current_thread() is main_thread()  # no other thread can set a handler, or is interrupted
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if handles else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handles:
            signal.signal(signal.SIGINT, handler)
    if held and callable(handler):
        handler(signal.SIGINT, None)


def _begin(reports: SimpleQueue[tuple[int, float, float]], lifeline: Connection) -> None:
    """Initialize a worker process."""
    global _reports
    _reports = reports
    # For systems where it is not blocked already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    # This takes seconds, during which the process may already be terminated.
    import torch

    torch.set_num_threads(1)


def _end_with(lifeline: Connection) -> None:
    """End this process once the other end of a pipe is closed; nothing is ever written to the pipe."""
    lifeline.poll(None)
    os._exit(1)


def _carry_out(number: int, cell: C, work: Work[C, R], store: Store[R]) -> R:
    """Run a cell in a worker process."""
    report = partial(_report, number)
    report(0.0, math.nan)
    result = work(cell, report)
    store.save(cell, result)
    return result


def _report(number: int, fraction: float, cost: float) -> None:
    _reports.put((number, fraction, cost))


_reports: SimpleQueue[tuple[int, float, float]]
