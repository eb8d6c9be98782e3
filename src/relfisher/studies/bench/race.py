"""Time to a loss: every method tunes as many configurations for as long, then runs its best one with every seed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relfisher.studies.bench.peers import PEERS, UNTUNED, Configuration, UnavailableError, state_bytes
from relfisher.studies.bench.step import iterate
from relfisher.studies.bench.workloads import WORKLOADS, Workload, batches, samples
from relfisher.studies.jobs import Reporter, Train, Watcher, execute
from relfisher.studies.runs import Record, Run, RunStore
from relfisher.studies.study import score

__all__ = [
    "RACES",
    "Race",
    "RaceOutcome",
    "RacePlan",
    "Racer",
    "available",
    "carry_out",
    "configuration",
    "plan",
    "reached",
    "running_mean",
]

EVALUATIONS = 20
TUNING_EVALUATIONS = 1
EVALUATED_AT_ONCE = 500
OPTION = "option "
OURS = ("FOOF", "RNGD", UNTUNED, "RNGD-trust-region", "RNGD-spectral")
PLAIN = ("SGD", "Adam", "AdamW", "Muon", "SOAP", "Shampoo", "K-FAC")


@dataclass(frozen=True)
class Race:
    """Methods on a workload, and the training loss that they run to: its mean over the last `window` mini-batches.

    Without a target it is the loss at equal time that counts. `budget` is the usual number of seconds a run.
    """

    workload: str
    methods: tuple[str, ...]
    target: float | None
    budget: float
    window: int


RACES = {
    "mlp": Race("mlp", (*PLAIN, "BNA+Adam", "BNB+Adam", *OURS), target=0.1, budget=180, window=100),
    "mlp-tanh": Race("mlp-tanh", (*PLAIN, *OURS), target=0.1, budget=180, window=100),
    "mlp-sigmoid": Race("mlp-sigmoid", (*PLAIN, *OURS), target=0.1, budget=180, window=100),
    "autoencoder": Race("autoencoder", (*PLAIN, *OURS), target=225.0, budget=180, window=10),
    "cnn": Race("cnn", (*PLAIN, *OURS), target=0.1, budget=240, window=50),
    "transformer": Race(
        "transformer", ("AdamW", "Muon", "SOAP", "RNGD", UNTUNED, "RNGD-spectral"), target=None, budget=300, window=20
    ),
}


@dataclass(frozen=True)
class RacePlan:
    """A race with its length: `tuning` and `budget` are the seconds of a tuning run and of a run."""

    name: str
    race: Race
    methods: tuple[str, ...]
    seeds: int
    tuning: float
    budget: float
    settings: Mapping[str, str | int | float]

    def candidates(self, method: str) -> list[Run]:
        """The tuning runs of a method, one a configuration."""
        return [
            self._run(method, options, 0, self.tuning, TUNING_EVALUATIONS) for options in PEERS[method].configurations
        ]

    def repeats(self, method: str, options: Configuration) -> list[Run]:
        """The runs of a method's configuration, one a seed."""
        return [self._run(method, options, seed, self.budget, EVALUATIONS) for seed in range(self.seeds)]

    @property
    def planned(self) -> int:
        """The number of runs, if every method has a configuration that does not diverge."""
        return sum(len(self.candidates(method)) + self.seeds for method in self.methods)

    def _run(self, method: str, options: Configuration, seed: int, seconds: float, evaluations: int) -> Run:
        others = {f"{OPTION}{name}": value for name, value in options.items() if name != "lr"}
        settings: dict[str, str | int | float] = {
            **self.settings,
            **others,
            "seconds": seconds,
            "evaluations": evaluations,
        }
        return Run(f"race-{self.name}", method, options["lr"], seed, tuple(sorted(settings.items())))


@dataclass(frozen=True)
class RaceOutcome:
    """All records of a race."""

    plan: RacePlan
    tuned: Mapping[Run, Record]
    records: Mapping[Run, Record]

    @cached_property
    def chosen(self) -> dict[str, Configuration | None]:
        """The configuration of each method whose tuning run had the lowest score; None where all diverged."""
        return {method: self._best(method) for method in self.plan.methods}

    def compared(self, method: str) -> list[Record]:
        """The records of the chosen configuration that did not diverge."""
        return [record for run, record in self.records.items() if run.method == method and not record.diverged]

    def diverged(self, method: str) -> int:
        """How many of a method's runs diverged, tuning runs included."""
        runs = {**self.tuned, **self.records}
        return sum(record.diverged for run, record in runs.items() if run.method == method)

    def _best(self, method: str) -> Configuration | None:
        best = min(self.plan.candidates(method), key=lambda run: score(self.tuned[run]))
        return configuration(best) if math.isfinite(score(self.tuned[best])) else None


def plan(
    name: str, source: str, *, methods: tuple[str, ...], seeds: int, tuning: float, budget: float, threads: int
) -> RacePlan:
    """Says which runs a race takes.

    Args:
        name: A key of `RACES`.
        source: The images' data set.
        methods: Among the race's.
        seeds: How many runs the chosen configuration gets.
        tuning: Seconds of a tuning run.
        budget: Seconds of a run.
        threads: Of each run.

    Returns:
        The plan.
    """
    race = RACES[name]
    workload = WORKLOADS[race.workload]
    data = samples(workload.kind, source)
    settings: dict[str, str | int | float] = {
        "workload": race.workload,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "batch_size": workload.batch_size,
        "threads": threads,
        "relfisher": version("relfisher"),
    }
    return RacePlan(name, race, methods, seeds, tuning, budget, settings)


def carry_out(race: RacePlan, train: Train, store: RunStore, *, jobs: int, watcher: Watcher) -> RaceOutcome:
    """Carries out every run of a race that the store does not have.

    Args:
        race: What is compared.
        train: Carries out one run.
        store: Holds the finished runs.
        jobs: The number of worker processes.
        watcher: Follows the execution.

    Returns:
        All records.
    """
    candidates = [run for method in race.methods for run in race.candidates(method)]
    first = RaceOutcome(race, execute(candidates, train, store, jobs=jobs, watcher=watcher), {})
    runs = [run for method, best in first.chosen.items() if best is not None for run in race.repeats(method, best)]
    return RaceOutcome(race, first.tuned, execute(runs, train, store, jobs=jobs, watcher=watcher))


def configuration(run: Run) -> Configuration:
    """Returns the options that a run's optimizer has."""
    others = {name.removeprefix(OPTION): float(value) for name, value in run.settings if name.startswith(OPTION)}
    return {"lr": run.learning_rate, **others}


def reached(record: Record, target: float | None, window: int) -> int | None:
    """Says when a run reached a loss.

    Args:
        record: The run.
        target: The loss, if there is one.
        window: How many mini-batches it is the mean of.

    Returns:
        The number of iterations it took, or None if it never did.
    """
    if target is None:
        return None
    (below,) = np.nonzero(running_mean(record.cost, window) <= target)
    return int(below[0]) + window if len(below) else None


def running_mean(values: NDArray[np.floating], window: int) -> NDArray[np.float64]:
    """Averages every `window` values that follow each other; of fewer values there is no mean."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    means: NDArray[np.float64] = (sums[window:] - sums[:-window]) / window
    return means


def available(methods: tuple[str, ...], workload: Workload) -> tuple[dict[str, str], tuple[str, ...]]:
    """Tells the methods that can be had from the others.

    Args:
        methods: Keys of `PEERS`.
        workload: They are made for its model.

    Returns:
        Why the others cannot, by method, and the names of those that can.
    """
    notes = {}
    for method in methods:
        try:
            PEERS[method].make(workload.build(0, PEERS[method].normalization))
        except UnavailableError as error:
            notes[method] = str(error)
    return notes, tuple(method for method in methods if method not in notes)


@dataclass(frozen=True)
class Racer:
    """Carries out runs on one data set, which each process loads for itself."""

    source: str

    def __call__(self, run: Run, report: Reporter) -> Record:
        """Trains one model for its seconds, or until its loss is not finite.

        Args:
            run: The method, its options and the seed; its settings say for how long.
            report: Is told at each evaluation how far the run is, and the latest loss.

        Returns:
            Loss and training time of every iteration, and what was found at each evaluation.
        """
        settings = dict(run.settings)
        torch.set_num_threads(int(settings["threads"]))
        workload = WORKLOADS[str(settings["workload"])]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            course = _Course(run, workload, self.source)
            course.drive(float(settings["seconds"]), int(settings["evaluations"]), report)
        return course.record(tuple(sorted({str(warning.message) for warning in caught})))


class _Course:
    """A run that goes on; its clock stands still while it is evaluated."""

    def __init__(self, run: Run, workload: Workload, source: str) -> None:
        peer = PEERS[run.method]
        self._workload = workload
        self._data = samples(workload.kind, source)
        self._model = workload.build(run.seed, peer.normalization)
        self._optimizer = peer.make(self._model, **configuration(run))
        self._batches = batches(self._data, workload.batch_size, torch.Generator().manual_seed(run.seed))
        self._cost: list[float] = []
        self._seconds: list[float] = []
        self._evaluated: list[int] = []
        self._validation: list[float] = []

    def drive(self, budget: float, evaluations: int, report: Reporter) -> None:
        # The first evaluation warms torch up, for every method alike.
        self._evaluate()
        due, clock = budget / evaluations, 0.0
        while clock < budget and not self._diverged:
            start = time.perf_counter()
            try:
                loss = float(iterate(self._model, self._optimizer, self._workload, next(self._batches)))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not list it
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                loss = math.nan
            clock += time.perf_counter() - start
            self._cost.append(loss)
            self._seconds.append(clock)
            if clock >= due:
                due = budget / evaluations * (1 + clock // (budget / evaluations))
                self._evaluate()
                report(min(1.0, clock / budget), self._cost[-1])

    def record(self, caught: tuple[str, ...]) -> Record:
        held = len(self._data.held_inputs)
        return Record(
            cost=np.array(self._cost, dtype=np.float32),
            seconds=np.array(self._seconds),
            validation=np.array(self._validation),
            full_cost=self._mean(self._workload.loss, self._data.inputs[:held], self._data.targets[:held]),
            diverged=self._diverged,
            threads=torch.get_num_threads(),
            warnings=caught,
            evaluated=tuple(self._evaluated),
            state_bytes=state_bytes(self._optimizer),
        )

    @property
    def _diverged(self) -> bool:
        return bool(self._cost) and not math.isfinite(self._cost[-1])

    def _evaluate(self) -> None:
        self._evaluated.append(len(self._cost))
        self._validation.append(self._mean(self._workload.validate, self._data.held_inputs, self._data.held_targets))

    @torch.no_grad()
    def _mean(self, measure: Callable[[nn.Module, Tensor, Tensor], Tensor | float], *both: Tensor) -> float:
        """The mean of a measure over all samples, as the trained model sees them."""
        self._model.eval()
        parts = list(zip(*(torch.split(part, EVALUATED_AT_ONCE) for part in both), strict=True))
        total = sum(float(measure(self._model, *part)) * len(part[0]) for part in parts)
        self._model.train()
        return total / len(both[0])
