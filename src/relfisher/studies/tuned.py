"""Runs of optimizers with several options, and races of such runs for equally many seconds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from relfisher.studies.cells import Options
from relfisher.studies.engine import Study
from relfisher.studies.peers import Configuration, Peer
from relfisher.studies.runs import Run, Scalar

__all__ = ["TimedRun", "TimedStudy", "TunedRun"]

EVALUATIONS = 20

Shared = TypeVar("Shared", bound=Options)
R = TypeVar("R", bound="TimedRun[Any]")


@dataclass(frozen=True)
class TunedRun(Run, Generic[Shared]):
    """A run, with the options that all runs of its study share, and its optimizer's other than the learning rate."""

    options: Shared
    others: tuple[tuple[str, float], ...]

    @property
    def configuration(self) -> Configuration:
        """The options of its optimizer."""
        return {"lr": self.learning_rate, **dict(self.others)}

    def settings(self) -> Mapping[str, Scalar]:
        """Return all options except those that every training run has."""
        return {**asdict(self.options), **{f"option {name}": value for name, value in self.others}}


@dataclass(frozen=True)
class TimedRun(TunedRun[Shared]):
    """A run or tuning run for some seconds, with evaluations in equal intervals."""

    seconds: float
    evaluations: int

    def settings(self) -> Mapping[str, Scalar]:
        """Return all options except those that every training run has."""
        return {**super().settings(), "seconds": self.seconds, "evaluations": self.evaluations}


@dataclass(frozen=True)
class TimedStudy(Study[R]):
    """A race with its durations: `tuning` and `budget` are the seconds of a tuning run and of a run."""

    name: str
    methods: tuple[str, ...]
    seeds: int
    tuning: float
    budget: float

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the methods."""
        return self.methods

    @property
    @abstractmethod
    def peers(self) -> Mapping[str, Peer]:
        """The methods by name, with their grids."""

    @abstractmethod
    def tuning_run(self, method: str, lr: float, **others: float) -> R:
        """Return the tuning run of a configuration."""

    def candidates(self, group: str) -> list[R]:
        """Return the tuning runs of a method, one per configuration."""
        return [self.tuning_run(group, **options) for options in self.peers[group].configurations]

    def repeats(self, best: R) -> list[R]:
        """Return the runs of a configuration, one per seed."""
        whole = replace(best, seconds=self.budget, evaluations=EVALUATIONS)
        return [replace(whole, seed=seed) for seed in range(self.seeds)]
