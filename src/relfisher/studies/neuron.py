"""Section 5.1 of the paper: one sigmoid neuron with GD, WhiteGD, NGD and WhiteNGD, each at its best configuration."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relfisher.studies.cells import Cell, Options, Result
from relfisher.studies.coordinates import Coordinates, raw, whitened
from relfisher.studies.data import Dataset
from relfisher.studies.descent import DAMPING, Configuration, descend
from relfisher.studies.engine import Outcome, Study
from relfisher.studies.executor import Reporter
from relfisher.studies.panels import Panel, problems

__all__ = [
    "GRID",
    "LEARNING_RATES",
    "METHODS",
    "MOMENTUMS",
    "Batch",
    "Curves",
    "Method",
    "NeuronOptions",
    "NeuronOutcome",
    "NeuronStudy",
    "log_mean",
    "lowest",
    "plan",
    "solve",
]

LEARNING_RATES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
MOMENTUMS = (0.0, 0.8)
GRID = tuple(Configuration(rate, momentum) for rate in LEARNING_RATES for momentum in MOMENTUMS)


@dataclass(frozen=True)
class Method:
    """A method: whether features are whitened first, and whether steps are natural (30) or plain gradients."""

    coordinates: Callable[[Tensor], Coordinates]
    natural: bool


METHODS = {
    "GD": Method(raw, natural=False),
    "WhiteGD": Method(whitened, natural=False),
    "NGD": Method(raw, natural=True),
    "WhiteNGD": Method(whitened, natural=True),
}


@dataclass(frozen=True)
class NeuronOptions(Options):
    """The options that all batches share."""

    runs: int
    epochs: int
    initial_std: float


@dataclass(frozen=True)
class Batch(Cell):
    """All runs and configurations of a method in a panel, which are computed together."""

    panel: Panel
    method: str
    options: NeuronOptions

    @property
    def name(self) -> str:
        """The readable part of its file name."""
        first, second = self.panel.pair
        return f"neuron-{first}vs{second}-n{self.panel.size}-{self.method}"

    def identity(self) -> str:
        """Return all options and the grid as text that does not depend on the process."""
        options = {
            "panel": asdict(self.panel),
            "method": self.method,
            "settings": sorted(asdict(self.options).items()),
            "grid": [asdict(entry) for entry in GRID],
            "damping": DAMPING,
        }
        return json.dumps(options)

    def __str__(self) -> str:
        return f"{self.panel}: {self.method}"


@dataclass(frozen=True)
class Curves(Result):
    """The results of a batch.

    `log_cost` is the natural logarithm of the training cost (29), [configurations, runs, epochs + 1]; NaN from the
    epoch where a configuration diverged. `seconds` is the time of the batch, coordinates included, with `threads`
    threads.
    """

    log_cost: Tensor
    seconds: float
    threads: int

    @property
    def score(self) -> float:
        """The logarithm of the lowest mean cost after the last epoch; infinity if all configurations diverged."""
        return float(self._final.min())

    @property
    def ending(self) -> str:
        """The lowest mean cost, if there is one, and the time."""
        if self.diverged:
            return f"all configurations diverged in {self.seconds:.1f} s"
        return f"cost 10^{self.score / math.log(10):.2f} in {self.seconds:.1f} s"

    @cached_property
    def chosen(self) -> Configuration | None:
        """The configuration with the lowest mean cost after the last epoch, among those without a diverged run."""
        return None if self.diverged else GRID[int(self._final.argmin())]

    @cached_property
    def best(self) -> Tensor:
        """The logarithm of the cost of each run of the chosen configuration, [runs, epochs + 1]."""
        return self.log_cost[int(self._final.argmin())]

    @property
    def mean(self) -> Tensor:
        """The logarithm of the mean cost of those runs after each epoch."""
        return log_mean(self.best)

    @cached_property
    def ends(self) -> dict[Configuration, int]:
        """The configurations with a diverged run, and the epoch of its first non-finite step."""
        finite = self.log_cost.isfinite().all(dim=1)
        return {GRID[index]: int(finite[index].sum()) for index in (~finite.all(dim=1)).nonzero().flatten().tolist()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the curves, the seconds and the threads."""
        return {"log_cost": self.log_cost.numpy(), "about": np.array([self.seconds, self.threads])}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Curves:
        """Return the curves from the result of `arrays`."""
        seconds, threads = arrays["about"].tolist()
        return cls(torch.from_numpy(arrays["log_cost"]), float(seconds), int(threads))

    @property
    def _final(self) -> Tensor:
        return log_mean(self.log_cost)[:, -1].nan_to_num(nan=math.inf)


@dataclass(frozen=True)
class NeuronStudy(Study[Batch]):
    """Panels and methods. The choice is between configurations within each batch, not between batches."""

    panels: tuple[Panel, ...]
    methods: tuple[str, ...]
    options: NeuronOptions

    @property
    def batches(self) -> list[Batch]:
        """All batches, panel by panel."""
        return [self.batch(panel, method) for panel in self.panels for method in self.methods]

    def batch(self, panel: Panel, method: str) -> Batch:
        """Return all runs and configurations of a method in a panel."""
        return Batch(panel, method, self.options)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups: each method in each panel."""
        return tuple(map(str, self.batches))

    def candidates(self, group: str) -> list[Batch]:
        """Return the single batch of a method in a panel."""
        return [batch for batch in self.batches if str(batch) == group]

    def repeats(self, best: Batch) -> list[Batch]:
        """Return the batch itself, which contains all runs."""
        return [best]


NeuronOutcome = Outcome[NeuronStudy, Batch, Curves]


def log_mean(log_cost: Tensor) -> Tensor:
    """Return ln of the mean cost over the runs, the second-to-last axis."""
    return torch.logsumexp(log_cost, dim=-2) - math.log(log_cost.shape[-2])


def lowest(outcome: NeuronOutcome, panel: Panel) -> float:
    """Return ln of the lowest mean cost in a panel, of all methods, configurations and epochs; infinity without one."""
    means = [log_mean(curves.log_cost) for batch, curves in outcome.records.items() if batch.panel == panel]
    return min((float(mean[mean.isfinite()].min()) for mean in means if mean.isfinite().any()), default=math.inf)


def plan(
    data: Dataset,
    chosen: tuple[Panel, ...],
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    runs: int = 10,
    epochs: int = 100,
    initial_std: float = 0.01,
) -> NeuronStudy:
    """Return the study of figure 4.

    Args:
        data: the data set.
        chosen: the panels.
        methods: names from `METHODS`.
        runs: the number of runs of each configuration.
        epochs: the number of full-batch steps.
        initial_std: the standard deviation of the initial weights, which the paper does not specify.

    Returns:
        The study.
    """
    options = NeuronOptions(data.name, data.fingerprint(), runs, epochs, initial_std)
    return NeuronStudy(chosen, methods, options)


def solve(data: Dataset, batch: Batch, report: Reporter) -> Curves:
    """Compute all runs and configurations of a method in a panel.

    Args:
        data: the data set.
        batch: the batch to compute.
        report: receives the finished fraction, from 0 to 1, and the lowest cost.

    Returns:
        The curves.
    """
    options, method = batch.options, METHODS[batch.method]
    begin = time.perf_counter()
    log_cost = descend(
        problems(data, batch.panel, method.coordinates, runs=options.runs, initial_std=options.initial_std),
        GRID,
        natural=method.natural,
        epochs=options.epochs,
        report=lambda epoch, cost: report(epoch / options.epochs, math.exp(cost)),
    )
    return Curves(log_cost, time.perf_counter() - begin, torch.get_num_threads())
