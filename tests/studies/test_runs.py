import math
import multiprocessing
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instant import instantly, record

from relfisher.studies.jobs import WorkerError, execute
from relfisher.studies.runs import Run, RunStore, write_atomically
from relfisher.studies.study import Study, carry_out, score

RUN = Run("test", "PLAIN+SGD", 0.1, 0, (("epochs", 2),))


class Log:
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.done = []

    def started(self, run):
        pass

    def progressed(self, run, fraction, cost):
        pass

    def finished(self, run, record, *, resumed):
        self.done.append((run, resumed))


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    store = RunStore(tmp_path)
    saved = record(0.25)
    store.save(RUN, saved)
    loaded = RunStore(tmp_path).load(RUN)
    np.testing.assert_array_equal(loaded.cost, saved.cost)
    np.testing.assert_array_equal(loaded.seconds, saved.seconds)
    np.testing.assert_array_equal(loaded.validation, saved.validation)
    assert (loaded.diverged, loaded.threads, loaded.warnings) == (False, 1, ("slow",))
    assert loaded.cost.dtype == np.float32


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "other"},
        {"method": "PLAIN+ADAM"},
        {"learning_rate": 0.1000001},
        {"seed": 1},
        {"settings": (("epochs", 3),)},
    ],
)
def test_any_other_setting_is_another_run(tmp_path, change):
    store = RunStore(tmp_path)
    store.save(RUN, record())
    assert store.load(replace(RUN, **change)) is None
    assert store.load(RUN) is not None


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_torn_file_counts_as_missing_and_is_reported(tmp_path_factory, kept):
    store = RunStore(tmp_path_factory.mktemp("runs"))
    store.save(RUN, record())
    path = store.path(RUN)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert store.load(RUN) is None
    assert store.damaged == [path]


def test_a_file_of_another_run_under_this_name_counts_as_damaged(tmp_path):
    store = RunStore(tmp_path)
    other = replace(RUN, seed=1)
    store.save(other, record())
    store.path(other).rename(store.path(RUN))
    assert store.load(RUN) is None
    assert store.damaged == [store.path(RUN)]


def test_only_old_temporary_files_are_removed(tmp_path):
    old, young = tmp_path / ".old.tmp", tmp_path / ".young.tmp"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    RunStore(tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_atomically(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "value"
    contents = {bytes([letter]) * 100_000 for letter in b"ab"}
    write_atomically(path, next(iter(contents)))
    writing = threading.Event()

    def write():
        for _ in range(20):
            for content in contents:
                write_atomically(path, content)
        writing.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not writing.is_set():
        assert path.read_bytes() in contents
    thread.join()


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
        execute(runs, train, RunStore(tmp_path), jobs=1, watcher=Log())
    log = Log()
    records = execute(runs, train, RunStore(tmp_path), jobs=1, watcher=log)
    assert trained == runs
    assert log.done == [(runs[0], True), (runs[1], True), (runs[2], False), (runs[3], False)]
    assert [records[run].cost[0] for run in runs] == [0, 1, 2, 3]


class Killer(Log):
    """A watcher that kills idle workers."""

    def finished(self, run, record, *, resumed):
        super().finished(run, record, resumed=resumed)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()


def test_a_worker_that_is_lost_before_its_next_run_is_told_of(tmp_path):
    runs = [replace(RUN, seed=seed) for seed in range(9)]
    killer = Killer()
    with pytest.raises(WorkerError, match=r"PLAIN\+SGD lr 0.1 seed \d ended with status -9"):
        execute(runs, instantly, RunStore(tmp_path), jobs=2, watcher=killer)
    assert len(killer.done) == 1


COSTS = {("A", 0.1): 3.0, ("A", 0.2): 1.0, ("A", 0.4): math.nan, ("B", 0.1): math.nan, ("B", 0.2): math.nan}


def by_costs(run, report):
    cost = COSTS[run.method, run.learning_rate]
    report(1.0, cost)
    return record(cost, diverged=math.isnan(cost))


def test_the_best_rate_that_did_not_diverge_gets_the_other_seeds(tmp_path):
    study = Study("test", {"A": (0.1, 0.2, 0.4), "B": (0.1, 0.2)}, seeds=3, settings={"epochs": 2})
    log = Log()
    outcome = carry_out(study, by_costs, RunStore(tmp_path), jobs=1, watcher=log)
    assert outcome.chosen == {"A": 0.2, "B": None}
    assert [(run.method, run.learning_rate, run.seed) for run, _ in log.done[5:]] == [("A", 0.2, 1), ("A", 0.2, 2)]
    assert len(outcome.compared("A")) == 3
    assert outcome.compared("B") == []
    assert [run.learning_rate for run in outcome.diverged("A")] == [0.4]
    assert study.planned == 3 + 2 + 2 * 2


def test_the_score_is_the_mean_over_the_last_tenth():
    cost = np.concatenate([np.full(90, 7.0), np.arange(10.0)]).astype(np.float32)
    assert score(replace(record(), cost=cost)) == 4.5
