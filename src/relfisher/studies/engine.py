"""The procedure of every study: run all candidates, choose the best of each group, repeat it, keep all results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from relfisher.studies.cells import Cell, Result
from relfisher.studies.executor import Watcher, Work, execute
from relfisher.studies.store import Store

__all__ = ["Outcome", "Study", "carry_out"]

C = TypeVar("C", bound=Cell)
R = TypeVar("R", bound=Result)


class Study(ABC, Generic[C]):
    """A comparison. A frozen dataclass."""

    @abstractmethod
    def candidates(self, group: str) -> Sequence[C]:
        """Return the candidate cells of a group."""

    @abstractmethod
    def repeats(self, best: C) -> Sequence[C]:
        """Return the cells that repeat the best candidate of a group."""

    def score(self, result: Result) -> float:
        """Return the score of a candidate's result: the lowest is the best."""
        return result.score

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The names of the compared groups, such as methods."""

    @property
    def planned(self) -> int:
        """The number of cells, if every group has a candidate that does not diverge."""
        groups = [self.candidates(group) for group in self.groups]
        return sum(len({*cells, *self.repeats(cells[0])}) for cells in groups)


S = TypeVar("S", bound=Study[Any])


@dataclass(frozen=True)
class Outcome(Generic[S, C, R]):
    """All results of a study."""

    study: S
    records: Mapping[C, R]

    @cached_property
    def chosen(self) -> dict[str, C | None]:
        """The candidate of each group with the lowest score of the study; None where all diverged."""
        return {group: self._best(group) for group in self.study.groups}

    def repeats(self, group: str) -> list[C]:
        """Return the cells that repeat a group's best candidate."""
        best = self.chosen[group]
        return [] if best is None else list(self.study.repeats(best))

    def compared(self, group: str) -> list[R]:
        """Return the results of the repeats that did not diverge."""
        results = [self.records[cell] for cell in self.repeats(group)]
        return [result for result in results if not result.diverged]

    def diverged(self, group: str) -> list[C]:
        """Return every cell of a group that diverged, candidates and repeats."""
        cells = dict.fromkeys([*self.study.candidates(group), *self.repeats(group)])
        return [cell for cell in cells if self.records[cell].diverged]

    def _best(self, group: str) -> C | None:
        best: C = min(self.study.candidates(group), key=lambda cell: self.study.score(self.records[cell]))
        return None if self.records[best].diverged else best


def carry_out(study: S, work: Work[C, R], store: Store[R], *, jobs: int, watcher: Watcher) -> Outcome[S, C, R]:
    """Run every cell of a study whose result is not stored yet.

    Args:
        study: the study.
        work: runs one cell.
        store: holds the results of finished cells.
        jobs: the number of worker processes.
        watcher: shows the progress.

    Returns:
        All results.
    """
    candidates = [cell for group in study.groups for cell in study.candidates(group)]
    first = Outcome(study, execute(candidates, work, store, jobs=jobs, watcher=watcher))
    repeats = [cell for group in study.groups for cell in first.repeats(group) if cell not in first.records]
    return Outcome(study, {**first.records, **execute(repeats, work, store, jobs=jobs, watcher=watcher)})
