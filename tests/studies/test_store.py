import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instant import Trial, record

from relfisher.files import write_atomically
from relfisher.studies.runs import Record
from relfisher.studies.store import Store

RUN = Trial("test", "PLAIN+SGD", 0.1, 0)


def store_in(directory):
    return Store(directory, Record.of)


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    store = store_in(tmp_path)
    saved = record(0.25)
    store.save(RUN, saved)
    loaded = store_in(tmp_path).load(RUN)
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
        {"epochs": 3},
    ],
)
def test_any_other_setting_is_another_run(tmp_path, change):
    store = store_in(tmp_path)
    store.save(RUN, record())
    assert store.load(replace(RUN, **change)) is None
    assert store.load(RUN) is not None


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_torn_file_counts_as_missing_and_is_reported(tmp_path_factory, kept):
    store = store_in(tmp_path_factory.mktemp("runs"))
    store.save(RUN, record())
    path = store.path(RUN)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert store.load(RUN) is None
    assert store.damaged == [path]


def test_a_file_of_another_run_under_this_name_counts_as_damaged(tmp_path):
    store = store_in(tmp_path)
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
    store_in(tmp_path)
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


def test_the_file_of_a_run_has_had_its_name_since_the_first_version():
    assert RUN.key == "test-PLAIN+SGD-lr0.1-seed0-8bd0e30db679"
