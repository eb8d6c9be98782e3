"""Time to a loss: all methods tune equally many configurations for equally long, then run the best with every seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from relfisher.studies.cells import Options
from relfisher.studies.engine import Outcome
from relfisher.studies.executor import Reporter
from relfisher.studies.peers import PEERS, UNTUNED, Peer
from relfisher.studies.runs import Record
from relfisher.studies.training import Length, Supervised, train
from relfisher.studies.tuned import TimedRun, TimedStudy
from relfisher.studies.workloads import WORKLOADS, samples

__all__ = [
    "RACES",
    "Race",
    "RaceOptions",
    "RaceOutcome",
    "RaceRun",
    "RaceStudy",
    "carry_out_run",
    "plan",
    "reached",
    "running_mean",
]

TUNING_EVALUATIONS = 1
OURS = ("FOOF", "RNGD", UNTUNED, "RNGD-trust-region", "RNGD-normalized")
PLAIN = ("SGD", "Adam", "AdamW", "Muon", "SOAP", "Shampoo", "K-FAC")


@dataclass(frozen=True)
class Race:
    """Methods on a workload, and their target training loss: its mean over the last `window` mini-batches.

    Without a target, losses at equal time are compared. `budget` is the default number of seconds per run.
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
        "transformer", ("AdamW", "Muon", "SOAP", "RNGD", UNTUNED, "RNGD-normalized"), target=None, budget=300, window=20
    ),
}


@dataclass(frozen=True)
class RaceOptions(Options):
    """The options that all runs share.

    `threads` is the number of threads of each run.
    """

    workload: str
    batch_size: int
    threads: int


class RaceRun(TimedRun[RaceOptions]):
    """A run or tuning run of a race."""


@dataclass(frozen=True)
class RaceStudy(TimedStudy[RaceRun]):
    """A race by training loss."""

    race: Race
    options: RaceOptions

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The methods by name, with their grids."""
        return PEERS

    def tuning_run(self, method: str, lr: float, **others: float) -> RaceRun:
        """Return the tuning run of a configuration."""
        return RaceRun(
            f"race-{self.name}", method, lr, 0, self.options, tuple(others.items()), self.tuning, TUNING_EVALUATIONS
        )


RaceOutcome = Outcome[RaceStudy, RaceRun, Record]


def plan(
    name: str, source: str, *, methods: tuple[str, ...], seeds: int, tuning: float, budget: float, threads: int
) -> RaceStudy:
    """Return the study of a race.

    Args:
        name: a key of `RACES`.
        source: the data set of images.
        methods: some of the race's methods.
        seeds: the number of runs of the chosen configuration.
        tuning: the seconds of a tuning run.
        budget: the seconds of a run.
        threads: the number of threads of each run.

    Returns:
        The study.
    """
    race = RACES[name]
    workload = WORKLOADS[race.workload]
    data = samples(workload.kind, source)
    options = RaceOptions(data.name, data.fingerprint, race.workload, workload.batch_size, threads)
    return RaceStudy(name, methods, seeds, tuning, budget, race, options)


def carry_out_run(source: str, run: RaceRun, report: Reporter) -> Record:
    """Train one model for its duration, or until its loss is not finite.

    Args:
        source: the data set of images, which this process loads itself.
        run: the method, its options, the seed and the duration.
        report: receives the progress of the run.

    Returns:
        The loss and training time of every iteration, and the result of each evaluation.
    """
    torch.set_num_threads(run.options.threads)
    workload, peer = WORKLOADS[run.options.workload], PEERS[run.method]
    data = samples(workload.kind, source)
    return train(
        Supervised(workload, data, scored=len(data.held_inputs)),
        partial(workload.build, run.seed, peer.normalization),
        partial(peer.make, **run.configuration),
        torch.Generator().manual_seed(run.seed),
        Length(evaluations=run.evaluations, seconds=run.seconds),
        report,
    )


def reached(record: Record, target: float | None, window: int) -> int | None:
    """Return when a run reached a loss.

    Args:
        record: the record of the run.
        target: the loss, or None.
        window: the number of mini-batches over which the loss is averaged.

    Returns:
        The number of iterations, or None if the run never reached it.
    """
    if target is None:
        return None
    (below,) = np.nonzero(running_mean(record.cost, window) <= target)
    return int(below[0]) + window if len(below) else None


def running_mean(values: NDArray[np.floating], window: int) -> NDArray[np.float64]:
    """Return the mean of every `window` consecutive values; empty if there are fewer values."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    means: NDArray[np.float64] = (sums[window:] - sums[:-window]) / window
    return means
