"""A race by error: each method's best configuration for equally many seconds, on an equation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from relfisher.studies.cells import Options, Result
from relfisher.studies.engine import Outcome
from relfisher.studies.executor import Reporter
from relfisher.studies.peers import Peer
from relfisher.studies.physics.methods import METHODS
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.physics.task import Solving
from relfisher.studies.runs import Record
from relfisher.studies.training import Length, train
from relfisher.studies.tuned import TimedRun, TimedStudy

__all__ = ["ErrorOutcome", "ErrorRun", "ErrorStudy", "Solved", "carry_out_run", "plan"]

BUDGET = 10.0
TUNING_EVALUATIONS = 4


@dataclass(frozen=True)
class ErrorOptions(Options):
    """The options that all runs share; the data are the equation's own points."""

    inside: int
    edge: int
    fresh: bool
    double: bool


class ErrorRun(TimedRun[ErrorOptions]):
    """A run or tuning run of a race by error."""


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
class ErrorStudy(TimedStudy[ErrorRun]):
    """A race by error."""

    options: ErrorOptions

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The methods by name, with their grids."""
        return METHODS

    def score(self, result: Result) -> float:
        """Return the error at the end of a run."""
        return result.score if result.diverged or not isinstance(result, Record) else float(result.validation[-1])

    def tuning_run(self, method: str, lr: float, **others: float) -> ErrorRun:
        """Return the tuning run of a configuration."""
        return ErrorRun(
            f"error-{self.name}", method, lr, 0, self.options, tuple(others.items()), self.tuning, TUNING_EVALUATIONS
        )


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
