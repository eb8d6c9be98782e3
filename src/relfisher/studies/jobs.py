"""Carries out training runs, one after another or in worker processes, and keeps every finished one."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Protocol, runtime_checkable

from relfisher.studies.runs import Record, Run, RunStore

__all__ = ["Reporter", "Train", "Watcher", "WorkerError", "execute"]

Reporter = Callable[[float, float], None]
"""Takes how much of a run is done, from 0 to 1, and its latest cost."""

Train = Callable[[Run, Reporter], Record]
"""Carries out one run; a worker process must be able to unpickle it."""


class WorkerError(RuntimeError):
    """A worker process ended without finishing its run."""


@runtime_checkable
class Watcher(Protocol):
    """Follows the execution, as a progress display does."""

    def started(self, run: Run) -> None:
        """A run begins."""

    def progressed(self, run: Run, fraction: float, cost: float) -> None:
        """A run has come some way."""

    def finished(self, run: Run, record: Record, *, resumed: bool) -> None:
        """A run is finished, or was found finished."""


def execute(runs: Sequence[Run], train: Train, store: RunStore, *, jobs: int, watcher: Watcher) -> dict[Run, Record]:
    """Carries out the runs that the store does not have.

    Args:
        runs: All runs that are wanted.
        train: Carries out one run.
        store: Holds finished runs; each new one is saved as soon as it is finished.
        jobs: The number of worker processes; with 1 the runs are carried out in this process.
        watcher: Is told about every start, progress and end.

    Returns:
        The record of every run.
    """
    records: dict[Run, Record] = {}
    for run in runs:
        if (record := store.load(run)) is not None:
            records[run] = record
            watcher.finished(run, record, resumed=True)
    missing = deque(run for run in runs if run not in records)
    if jobs == 1 or len(missing) < 2:
        for run in missing:
            watcher.started(run)
            record = train(run, partial(watcher.progressed, run))
            store.save(run, record)
            records[run] = record
            watcher.finished(run, record, resumed=False)
    else:
        records |= _in_workers(missing, train, store, jobs, watcher)
    return records


@dataclass
class _Worker:
    """A process that carries out runs one at a time, and this process's end of the pipe to it."""

    process: SpawnProcess
    pipe: Connection
    run: Run | None = None


def _in_workers(missing: deque[Run], train: Train, store: RunStore, jobs: int, watcher: Watcher) -> dict[Run, Record]:
    records: dict[Run, Record] = {}
    context = multiprocessing.get_context("spawn")
    workers = [_start(context, train, store) for _ in range(min(jobs, len(missing)))]
    try:
        for worker in workers:
            _hand_out(worker, missing, watcher)
        while busy := {worker.pipe: worker for worker in workers if worker.run is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # typeshed: wait may also return handles
                record = _listen(worker, watcher)
                if record is not None and worker.run is not None:
                    records[worker.run] = record
                    watcher.finished(worker.run, record, resumed=False)
                    _hand_out(worker, missing, watcher)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
    return records


def _start(context: SpawnContext, train: Train, store: RunStore) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, train, store), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _hand_out(worker: _Worker, missing: deque[Run], watcher: Watcher) -> None:
    worker.run = missing.popleft() if missing else None
    if worker.run is not None:
        watcher.started(worker.run)
        with _alive(worker):
            worker.pipe.send(worker.run)


def _listen(worker: _Worker, watcher: Watcher) -> Record | None:
    run = worker.run
    if run is None:
        return None
    with _alive(worker):
        message = worker.pipe.recv()
    if isinstance(message, Record):
        return message
    if isinstance(message, BaseException):
        raise message
    watcher.progressed(run, *message)
    return None


@contextmanager
def _alive(worker: _Worker) -> Iterator[None]:
    """Says whose process has ended if the pipe to it is found broken."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        worker.process.join()
        raise WorkerError(f"the process of {worker.run} ended with status {worker.process.exitcode}") from error


def _work(pipe: Connection, train: Train, store: RunStore) -> None:
    """Takes runs from the pipe until its other end is closed, which the end of the main process also does."""
    import torch

    # Ctrl-C reaches the whole process group; the main process decides what to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            run = pipe.recv()
            try:
                record = train(run, lambda fraction, cost: pipe.send((fraction, cost)))
                store.save(run, record)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                pipe.send(error)
            else:
                pipe.send(record)
    except (EOFError, ConnectionError):
        return
