"""A comparison of methods: every learning rate with one seed, then the best one of each method with the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from relfisher.studies.jobs import Train, Watcher, execute
from relfisher.studies.runs import Record, Run, RunStore

__all__ = ["Outcome", "Study", "carry_out", "score"]

SCORED_FRACTION = 0.1


@dataclass(frozen=True)
class Study:
    """What is compared: the learning-rate candidates of each method, how many seeds, and all other settings."""

    experiment: str
    grids: Mapping[str, tuple[float, ...]]
    seeds: int
    settings: Mapping[str, str | int | float]

    def run(self, method: str, learning_rate: float, seed: int) -> Run:
        """One of the runs of the comparison."""
        return Run(self.experiment, method, learning_rate, seed, tuple(sorted(self.settings.items())))

    def candidates(self, method: str) -> list[Run]:
        """The runs that choose a method's learning rate: all of its grid, with the first seed."""
        return [self.run(method, learning_rate, 0) for learning_rate in self.grids[method]]

    @property
    def planned(self) -> int:
        """The number of runs, if every method has a learning rate that does not diverge."""
        return sum(len(grid) + self.seeds - 1 for grid in self.grids.values())


@dataclass(frozen=True)
class Outcome:
    """All records of a study. What concerns a chosen learning rate leaves diverged runs out."""

    study: Study
    records: Mapping[Run, Record]

    @cached_property
    def chosen(self) -> dict[str, float | None]:
        """The learning rate of each method with the lowest score; None where all candidates diverged."""
        return {method: self._best(method) for method in self.study.grids}

    def repeats(self, method: str) -> list[Run]:
        """The runs of the chosen learning rate, one a seed."""
        learning_rate = self.chosen[method]
        if learning_rate is None:
            return []
        return [self.study.run(method, learning_rate, seed) for seed in range(self.study.seeds)]

    def compared(self, method: str) -> list[Record]:
        """The records of the chosen learning rate that did not diverge."""
        records = [self.records[run] for run in self.repeats(method)]
        return [record for record in records if not record.diverged]

    def diverged(self, method: str) -> list[Run]:
        """Every run of a method that diverged."""
        return [run for run, record in self.records.items() if run.method == method and record.diverged]

    def _best(self, method: str) -> float | None:
        scores = {run.learning_rate: score(self.records[run]) for run in self.study.candidates(method)}
        best = min(scores, key=lambda learning_rate: scores[learning_rate])
        return best if math.isfinite(scores[best]) else None


def score(record: Record) -> float:
    """Judges a candidate: its mean training cost over the last tenth of the iterations.

    Args:
        record: A run.

    Returns:
        The mean, or infinity if the run diverged.
    """
    if record.diverged:
        return math.inf
    last = max(1, round(SCORED_FRACTION * len(record.cost)))
    return float(record.cost[-last:].mean(dtype=float))


def carry_out(study: Study, train: Train, store: RunStore, *, jobs: int, watcher: Watcher) -> Outcome:
    """Carries out every run of a study that the store does not have.

    Args:
        study: What is compared.
        train: Carries out one run.
        store: Holds the finished runs.
        jobs: The number of worker processes.
        watcher: Follows the execution.

    Returns:
        All records.
    """
    candidates = [run for method in study.grids for run in study.candidates(method)]
    records = execute(candidates, train, store, jobs=jobs, watcher=watcher)
    first = Outcome(study, records)
    others = [run for method in study.grids for run in first.repeats(method) if run not in records]
    return Outcome(study, records | execute(others, train, store, jobs=jobs, watcher=watcher))
