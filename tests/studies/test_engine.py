import math
import multiprocessing
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from instant import Log, Trial, impossible, instantly, instantly_at_first, record

from relfisher.studies import executor
from relfisher.studies.engine import Study, carry_out
from relfisher.studies.executor import WorkerError, execute
from relfisher.studies.runs import Record
from relfisher.studies.store import Store

RUN = Trial("test", "PLAIN+SGD", 0.1, 0)


def test_a_stopped_execution_goes_on_with_what_is_missing(tmp_path):
    runs = [replace(RUN, seed=seed) for seed in range(4)]
    trained, begun = [], []

    def train(run, report):
        begun.append(run)
        report(0.5, 1.0)
        if len(begun) == 3:
            raise KeyboardInterrupt
        trained.append(run)
        return record(run.seed)

    with pytest.raises(KeyboardInterrupt):
        execute(runs, train, Store(tmp_path, Record.of), jobs=1, watcher=Log())
    log = Log()
    records = execute(runs, train, Store(tmp_path, Record.of), jobs=1, watcher=log)
    assert trained == runs
    assert log.done == [(runs[0], True), (runs[1], True), (runs[2], False), (runs[3], False)]
    assert [records[run].cost[0] for run in runs] == [0, 1, 2, 3]


class Killer(Log):
    """A watcher that kills the workers once a run is finished."""

    def finished(self, run, ending):
        super().finished(run, ending)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()


def test_a_lost_worker_is_told_of_with_what_was_going_on(tmp_path):
    runs = [replace(RUN, seed=seed) for seed in range(4)]
    killer = Killer()
    with pytest.raises(WorkerError, match=r"a worker process was lost during (PLAIN\+SGD lr 0.1 seed [1-3]|its start)"):
        execute(runs, instantly_at_first, Store(tmp_path, Record.of), jobs=2, watcher=killer)
    assert killer.done == [(runs[0], False)]


COSTS = {("A", 0.1): 3.0, ("A", 0.2): 1.0, ("A", 0.4): math.nan, ("B", 0.1): math.nan, ("B", 0.2): math.nan}


def by_costs(run, report):
    cost = COSTS[run.method, run.learning_rate]
    report(1.0, cost)
    return record(cost, diverged=math.isnan(cost))


@dataclass(frozen=True)
class Rates(Study):
    grids: dict
    seeds: int

    @property
    def groups(self):
        return tuple(self.grids)

    def candidates(self, group):
        return [Trial("test", group, rate, 0) for rate in self.grids[group]]

    def repeats(self, best):
        return [replace(best, seed=seed) for seed in range(self.seeds)]


def test_the_best_rate_that_did_not_diverge_gets_the_other_seeds(tmp_path):
    study = Rates({"A": (0.1, 0.2, 0.4), "B": (0.1, 0.2)}, seeds=3)
    log = Log()
    outcome = carry_out(study, by_costs, Store(tmp_path, Record.of), jobs=1, watcher=log)
    assert outcome.chosen == {"A": Trial("test", "A", 0.2, 0), "B": None}
    assert [(run.method, run.learning_rate, run.seed) for run, _ in log.done[5:]] == [("A", 0.2, 1), ("A", 0.2, 2)]
    assert len(outcome.compared("A")) == 3
    assert outcome.compared("B") == []
    assert [run.learning_rate for run in outcome.diverged("A")] == [0.4]
    assert study.planned == 3 + 2 + 2 * 2


def test_the_score_is_the_mean_over_the_last_tenth():
    cost = np.concatenate([np.full(90, 7.0), np.arange(10.0)]).astype(np.float32)
    assert replace(record(), cost=cost).score == 4.5


def test_workers_carry_out_every_run_and_save_it(tmp_path):
    runs = [replace(RUN, seed=seed) for seed in range(5)]
    log = Log()
    records = execute(runs, instantly, Store(tmp_path, Record.of), jobs=2, watcher=log)
    assert list(records) == runs
    assert [record.cost[0] for record in records.values()] == [0, 1, 2, 3, 4]
    assert sorted(log.done, key=lambda done: done[0].seed) == [(run, False) for run in runs]
    assert all(Store(tmp_path, Record.of).load(run) is not None for run in runs)


def test_an_error_in_a_worker_is_raised_here(tmp_path):
    runs = [replace(RUN, method=method) for method in ("A", "B")]
    with pytest.raises(ZeroDivisionError):
        execute(runs, impossible, Store(tmp_path, Record.of), jobs=2, watcher=Log())


@contextmanager
def handled():
    """Handle Ctrl-C as a program does; processes that run tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_workers_to_start():
    """Also if another thread receives it."""

    def receive():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    passed = []

    def start():
        with handled(), executor._interrupts_held():
            receiver = threading.Thread(target=receive)
            receiver.start()
            receiver.join()
            time.sleep(0.01)
            passed.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert passed


def test_other_threads_block_ctrl_c_for_their_workers():
    blocked = []

    def start():
        with executor._interrupts_held():
            blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert blocked == [True]
