"""A race by error: each method's best configuration for equally many seconds, on an equation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from relfisher.studies.cells import Options, Result
from relfisher.studies.engine import Outcome, Study
from relfisher.studies.executor import Reporter
from relfisher.studies.peers import Configuration
from relfisher.studies.physics.methods import METHODS
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.physics.task import Solving
from relfisher.studies.runs import Record, Run, Scalar
from relfisher.studies.training import Length, train

__all__ = ["ErrorOutcome", "ErrorRun", "ErrorStudy", "Solved", "carry_out_run", "plan"]

BUDGET = 10.0
EVALUATIONS = 20
TUNING_EVALUATIONS = 4


@dataclass(frozen=True)
class ErrorOptions(Options):
    """The options that all runs share; the data are the equation's own points."""

    inside: int
    edge: int
    fresh: bool
    double: bool


@dataclass(frozen=True)
class ErrorRun(Run):
    """A run or tuning run, with the options of its optimizer other than the learning rate."""

    options: ErrorOptions
    others: tuple[tuple[str, float], ...]
    seconds: float
    evaluations: int

    @property
    def configuration(self) -> Configuration:
        """The options of its optimizer."""
        return {"lr": self.learning_rate, **dict(self.others)}

    def settings(self) -> Mapping[str, Scalar]:
        """Return all options except those that every training run has."""
        others = {f"option {name}": value for name, value in self.others}
        return {**asdict(self.options), **others, "seconds": self.seconds, "evaluations": self.evaluations}


@dataclass(frozen=True)
class Solved(Record):
    """The measurements of a run, whose validation is the relative error, and its solution on the grid."""

    solution: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 1), dtype=np.float32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the record, and the solution."""
        return {**super().arrays(), "solution": self.solution}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Solved:
        """Return the record from the result of `arrays`."""
        return cls.extending(Record.of(arrays), arrays["solution"])

    @classmethod
    def extending(cls, record: Record, solution: NDArray[np.float32]) -> Solved:
        """Return a record with its solution."""
        return cls(**{each.name: getattr(record, each.name) for each in fields(Record)}, solution=solution)


@dataclass(frozen=True)
class ErrorStudy(Study[ErrorRun]):
    """A race by error: `tuning` and `budget` are the seconds of a tuning run and of a run."""

    name: str
    methods: tuple[str, ...]
    seeds: int
    tuning: float
    budget: float
    options: ErrorOptions

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the methods."""
        return self.methods

    def score(self, result: Result) -> float:
        """Return the error at the end of a run."""
        return result.score if result.diverged or not isinstance(result, Record) else float(result.validation[-1])

    def candidates(self, group: str) -> list[ErrorRun]:
        """Return the tuning runs of a method, one per configuration."""
        return [self._tuning_run(group, **options) for options in METHODS[group].configurations]

    def repeats(self, best: ErrorRun) -> list[ErrorRun]:
        """Return the runs of a configuration, one per seed."""
        whole = replace(best, seconds=self.budget, evaluations=EVALUATIONS)
        return [replace(whole, seed=seed) for seed in range(self.seeds)]

    def _tuning_run(self, method: str, lr: float, **others: float) -> ErrorRun:
        tuned = tuple(others.items())
        return ErrorRun(f"error-{self.name}", method, lr, 0, self.options, tuned, self.tuning, TUNING_EVALUATIONS)


ErrorOutcome = Outcome[ErrorStudy, ErrorRun, Solved]


def plan(name: str, *, methods: tuple[str, ...], seeds: int, tuning: float, budget: float) -> ErrorStudy:
    """Return the study of a race by error.

    Args:
        name: a key of `PROBLEMS`.
        methods: keys of `METHODS`.
        seeds: the number of runs of the chosen configuration.
        tuning: the seconds of a tuning run.
        budget: the seconds of a run.

    Returns:
        The study.
    """
    equation = PROBLEMS[name]
    about = (equation.inside, equation.edge, equation.fresh, equation.double)
    return ErrorStudy(name, methods, seeds, tuning, budget, ErrorOptions(name, "drawn from the seed", *about))


def carry_out_run(run: ErrorRun, report: Reporter) -> Solved:
    """Train one network for its duration, or until its loss is not finite.

    Args:
        run: the method, its options, the seed and the duration.
        report: receives the progress of the run.

    Returns:
        The loss and training time of every step, the error at each evaluation, and the solution at the end.
    """
    torch.set_num_threads(1)
    task, method = Solving(PROBLEMS[run.options.data]), METHODS[run.method]
    model = task.equation.build(run.seed)
    record = train(
        task,
        lambda: model,
        partial(method.make, **run.configuration),
        torch.Generator().manual_seed(run.seed),
        Length(evaluations=run.evaluations, seconds=run.seconds),
        report,
        method.pace,
    )
    with torch.no_grad():
        found = task.equation.solution(model, task.answered[0].to(task.equation.dtype))
    return Solved.extending(record, found.float().numpy())
