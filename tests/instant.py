"""Runs that train nothing, in a module that the worker processes of a test can import, and a watcher of runs."""

import math
import time
from dataclasses import dataclass

import numpy as np

from relfisher.studies.executor import RESUMED
from relfisher.studies.runs import Record, Run


@dataclass(frozen=True)
class Trial(Run):
    """A run with one more option."""

    epochs: int = 2

    def settings(self):
        return {"epochs": self.epochs}


def record(level=1.0, *, diverged=False, iterations=40):
    cost = np.full(iterations, level, dtype=np.float32)
    if diverged:
        cost[-1] = math.nan
    return Record(cost, np.arange(iterations) / 100, np.array([0.5, 0.75]), 0.3, diverged, warnings=("slow",))


def instantly(run, _):
    return record(run.seed)


def instantly_at_first(run, _):
    """The first run ends at once, the others when their process is killed."""
    if run.seed > 0:
        time.sleep(3600)
    return record(run.seed)


def impossible(_run, _report):
    return 1 // 0


class Log:
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.done = []

    def progressed(self, run, fraction, cost):
        pass

    def finished(self, run, ending):
        self.done.append((run, ending == RESUMED))
